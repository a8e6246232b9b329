"""Published dictionaries: their layouts are read, their forward pass equals one written from their papers, and
transcoders change the difference that their features make."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny_sae import edit, embeds, flux, quiet, run
from typer.testing import CliRunner

from imgdit.apps.cli import app
from imgdit.sae.config import SAEConfig
from imgdit.sae.convert import convert_published
from imgdit.sae.edits import Edit
from imgdit.sae.features import heat_maps, survey_features
from imgdit.sae.hooks import hooked
from imgdit.sae.model import SparseAutoencoder, TimeConditionedAutoencoder, load_sae
from imgdit.sae.statistics import collect_statistics
from imgdit.sae.unlearning import ConceptUnlearner, steer

D, L, T = 32, 48, 8


def numbers(*shape, seed=0, scale=0.3):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def difffract_state():
    """A state_dict in DifFRACT's names and shapes, d = 32 instead of 3072."""
    linear = {
        "time_mlp.0": (T, T),
        "time_mlp.2": (T, T),
        "mod_linear": (2 * D, T),
        "encoder": (L, D),
        "decoder": (D, L),
    }
    state = {}
    for seed, (name, (out, into)) in enumerate(linear.items()):
        state |= {f"{name}.weight": numbers(out, into, seed=seed), f"{name}.bias": numbers(out, seed=10 + seed)}
    return state


def difffract(state, x, t):
    """(output, features) of rows (N, d) at t in [0, 1], after arXiv 2606.15796, section 3.1."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(T // 2) / (T // 2 - 1))
    time = torch.cat([(t * frequencies).sin(), (t * frequencies).cos()])[None]
    for layer in (0, 2):
        time = F.silu(F.linear(time, state[f"time_mlp.{layer}.weight"], state[f"time_mlp.{layer}.bias"]))
    scale, shift = F.linear(time, state["mod_linear.weight"], state["mod_linear.bias"]).chunk(2, -1)
    features = F.linear(x * (1 + scale) + shift, state["encoder.weight"], state["encoder.bias"]).relu()
    return F.linear(features, state["decoder.weight"], state["decoder.bias"]), features


@pytest.fixture(scope="module")
def dictionaries(tmp_path_factory):
    folder = tmp_path_factory.mktemp("difffract")
    for name in ("transcoder_img_0", "transcoder_txt_1"):
        torch.save(difffract_state(), folder / f"{name}.pt")
    outcome = CliRunner().invoke(app, ["sae", "convert", str(folder), str(folder / "ours")])
    assert outcome.exit_code == 0, outcome.output
    return folder / "ours"


@pytest.mark.parametrize("kind", ["transcoder", "sae"])
def test_difffract_equals_its_paper(tmp_path, kind):
    state, x = difffract_state(), numbers(20, D, scale=1.0)
    torch.save(state, tmp_path / f"{kind}_txt_12.pt")
    (folder,) = convert_published(tmp_path / f"{kind}_txt_12.pt", tmp_path / "ours")
    assert folder.name == "transformer.transformer_blocks.12.ff_context"
    sae = load_sae(folder)
    assert isinstance(sae, TimeConditionedAutoencoder) and sae.config.transcode == (kind == "transcoder")
    for timestep in (1000.0, 250.0):
        expected, features = difffract(state, x, timestep / 1000)
        torch.testing.assert_close(sae(x, timestep), expected, rtol=1e-5, atol=1e-5)
        rows, _ = sae.normalize(x, timestep)
        torch.testing.assert_close(sae.encode(rows).dense(), features, rtol=1e-5, atol=1e-5)
    sae.save_pretrained(tmp_path / "again")
    assert torch.equal(load_sae(tmp_path / "again")(x, 700.0), sae(x, 700.0))
    with pytest.raises(ValueError, match=r"conditioned on the timestep, got None; give one in \[0, 1000\]"):
        sae(x)
    with pytest.raises(NotImplementedError, match="train a SparseAutoencoder"):
        sae.loss(x)


@pytest.mark.parametrize("stream, layer", [("ff", 0), ("ff_context", 1)])
def test_a_transcoder_edits_the_difference(dictionaries, stream, layer):
    """out + sum of a_f(in) (factor_f - 1) W_dec[f], at the module's own input and at each timestep."""
    hookpoint, state = f"transformer.transformer_blocks.{layer}.{stream}", difffract_state()
    pipe, inputs = flux()
    sae = load_sae(dictionaries, hookpoint)
    inner = pipe.transformer.get_submodule(hookpoint.partition(".")[2])
    read, before, edited, times = [], [], [], []
    factors = {3: 0.0, 7: -2.0}
    handle = inner.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    with hooked(pipe, {hookpoint: lambda tokens: before.append(tokens.values) or times.append(tokens.call.timestep)}):
        with steer(quiet(pipe), sae, factors), hooked(pipe, {hookpoint: lambda tokens: edited.append(tokens.values)}):
            run(pipe, inputs)
    handle.remove()
    assert len(edited) == len(times) == len(set(times)) > 1
    for x, y, seen, time in zip(read, before, edited, times, strict=True):
        _, features = difffract(state, x.flatten(0, 1), time / 1000)
        expected = y.clone().flatten(0, 1)
        for f, factor in factors.items():
            expected += features[:, f : f + 1] * (factor - 1) * state["decoder.weight"][:, f]
        assert (expected - y.flatten(0, 1)).abs().max() > 1e-3
        torch.testing.assert_close(seen.flatten(0, 1), expected, rtol=1e-5, atol=1e-5)


def test_transcoders_unlearn_and_are_shown(dictionaries, tmp_path):
    """What is selected are features of the module's input; factor 1 changes nothing; `replace` is refused."""
    pipe, inputs = flux()
    hookpoint = "transformer.transformer_blocks.0.ff"
    names = ("prompt_embeds", "pooled_prompt_embeds")
    prompts = [
        {name: value[:1] for name, value in embeds(*names).items()},
        {n: v[1:] for n, v in embeds(*names).items()},
    ]
    call = {"num_inference_steps": 2, "height": 16, "width": 24}
    sae = load_sae(dictionaries, hookpoint)
    statistics = collect_statistics(quiet(pipe), {hookpoint: sae}, {"a": prompts[:1], "b": prompts[1:]}, **call)
    recorded = []
    handle = pipe.transformer.transformer_blocks[0].ff.register_forward_pre_hook(
        lambda module, args: recorded.append(args[0])
    )
    survey = survey_features(pipe, sae, prompts, batch_size=1, **call)
    handle.remove()
    for n, time in enumerate(survey.timesteps):
        expected = [difffract(difffract_state(), recorded[n + 2 * i][0], time / 1000)[1].mean(0) for i in range(2)]
        torch.testing.assert_close(statistics[hookpoint].means["a"][n], expected[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(survey.means[n], sum(expected) / 2, rtol=1e-4, atol=1e-5)
    shown = heat_maps(pipe, sae, prompts, [1, 2], output_type="latent", **call)
    assert shown.maps.shape[:2] == (2, 2)
    unlearner = ConceptUnlearner({hookpoint: sae})
    unlearner.learn(pipe, {"a": prompts[:1], "b": prompts[1:]}, top_n=3, **call)
    unlearner.save_pretrained(tmp_path)
    unlearner = ConceptUnlearner.from_pretrained(tmp_path)
    plain = run(pipe, inputs)
    with unlearner.attach(pipe, ["a"], multiplier=-30.0):
        assert not torch.equal(run(pipe, inputs), plain)
    for options, said in (
        ({"mode": "replace"}, "use 'scale' or 'remove'"),
        ({"paper_compat": True}, "SAeUron's rule"),
    ):
        with pytest.raises(ValueError, match=said), unlearner.attach(pipe, ["a"], **options):
            pass
    assert torch.equal(run(pipe, inputs), plain)


def test_an_update_of_an_mlp_is_read_where_its_output_is():
    """The image's rows of an MLP's input are those of its output, whatever stands before them in joint sequences."""
    pipe, inputs = flux()
    module, calls, seen = pipe.transformer.transformer_blocks[0].ff, [], []
    handle = module.register_forward_hook(lambda module, args, output: calls.append(output - args[0]))
    hookpoint = "transformer.transformer_blocks.0.ff"
    with hooked(pipe, {hookpoint: lambda tokens: seen.append(tokens.values)}, source={hookpoint: "update"}):
        run(quiet(pipe), inputs)
    handle.remove()
    assert calls and all(torch.equal(one, other) for one, other in zip(calls, seen, strict=True))


SAELENS = {
    "standard": {"architecture": "standard", "normalize_activations": "none"},
    "bias stays": {"architecture": "standard", "apply_b_dec_to_input": False},
    "layer norm": {"architecture": "standard", "normalize_activations": "layer_norm"},
    "topk": {"architecture": "topk", "k": 5},
    "topk of version 5": {"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 5}},
    "topk by norm": {"architecture": "topk", "k": 5, "rescale_acts_by_decoder_norm": True},
    "jumprelu": {"architecture": "jumprelu"},
    "transcoder": {"architecture": "transcoder", "d_out": D, "apply_b_dec_to_input": False},
    "skip transcoder": {"architecture": "skip_transcoder", "d_out": D, "apply_b_dec_to_input": False},
    "jumprelu transcoder": {"architecture": "jumprelu_transcoder", "d_out": D, "apply_b_dec_to_input": False},
}


def saelens_folder(folder, **values):
    tensors = {"W_enc": numbers(D, L), "b_enc": numbers(L), "W_dec": numbers(L, D, seed=1), "b_dec": numbers(D)}
    architecture = values.get("architecture", "")
    if "jumprelu" in architecture:
        tensors["threshold"] = numbers(L, seed=2, scale=1.0).abs()
        tensors["threshold"][0] = 0.0
    if architecture == "skip_transcoder":
        tensors["W_skip"] = numbers(D, D)
    config = {"d_in": D, "d_sae": L, "dtype": "float32", "metadata": {"hook_name": "transformer.x"}, **values}
    folder.mkdir()
    save_file(tensors, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config))
    return config, tensors


def saelens(config, tensors, x):
    """SAELens's forward pass, dense."""
    mean = std = None
    if config.get("normalize_activations") == "layer_norm":
        mean, std = x.mean(1, keepdim=True), x.std(1, keepdim=True)
        x = (x - mean) / (std + 1e-5)
    read = x - tensors["b_dec"] if config.get("apply_b_dec_to_input", True) else x
    scores = read @ tensors["W_enc"] + tensors["b_enc"]
    norm = tensors["W_dec"].norm(dim=1) if config.get("rescale_acts_by_decoder_norm") else torch.ones(L)
    scores = scores * norm
    k = config.get("k") or config.get("activation_fn_kwargs", {}).get("k")
    acts = scores.relu()
    if k:
        acts = acts * torch.zeros_like(acts).scatter(1, scores.topk(k).indices, 1.0)
    if "threshold" in tensors:
        acts = acts * (scores > tensors["threshold"])
    out = (acts / norm) @ tensors["W_dec"] + tensors["b_dec"]
    if "W_skip" in tensors:
        out = out + x @ tensors["W_skip"].t()
    return (out if std is None else out * std + mean), acts


@pytest.mark.parametrize("name", SAELENS)
def test_saelens_folders(tmp_path, name):
    config, tensors = saelens_folder(tmp_path / "published", **SAELENS[name])
    sae, x = load_sae(tmp_path / "published"), numbers(30, D, seed=5, scale=2.0)
    assert sae.config.hookpoint == "transformer.x" and sae.config.transcode == ("transcoder" in name)
    expected, acts = saelens(config, tensors, x)
    torch.testing.assert_close(sae(x), expected, rtol=1e-5, atol=1e-5)
    rows, _ = sae.normalize(x)
    torch.testing.assert_close(sae.encode(rows).dense(), acts, rtol=1e-5, atol=1e-5)
    sae.save_pretrained(tmp_path / "ours")
    assert torch.equal(load_sae(tmp_path / "ours")(x), sae(x))


def test_thresholds_of_features_hold_in_edits(tmp_path):
    """A JumpReLU feature below its own threshold is not changed."""
    config, tensors = saelens_folder(tmp_path / "jump", architecture="jumprelu")
    sae, x = load_sae(tmp_path / "jump"), numbers(30, D, seed=5, scale=2.0)
    changed = edit(sae, x, Edit(torch.tensor([4, 9]), torch.tensor([0.0, 3.0]), torch.zeros(2)))
    _, acts = saelens(config, tensors, x)
    expected = x - acts[:, 4:5] * tensors["W_dec"][4] + 2 * acts[:, 9:10] * tensors["W_dec"][9]
    assert ((acts[:, 4] == 0) & ((x - tensors["b_dec"]) @ tensors["W_enc"][:, 4] + tensors["b_enc"][4] > 0)).any()
    torch.testing.assert_close(changed, expected, rtol=1e-5, atol=1e-5)


def test_sparsify_skip_transcoders(tmp_path):
    """cfg.json and sae.safetensors as EleutherAI's sparsify 1.3 writes them."""
    tensors = {
        "encoder.weight": numbers(L, D), "encoder.bias": numbers(L), "W_dec": numbers(L, D, seed=1),
        "b_dec": numbers(D), "W_skip": numbers(D, D),
    }  # fmt: skip
    config = {
        "activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": L, "k": 4,
        "multi_topk": False, "skip_connection": True, "transcode": True, "d_in": D,
    }  # fmt: skip
    folder = tmp_path / "transformer.transformer_blocks.0.ff"
    folder.mkdir()
    save_file(tensors, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config))
    sae, x = load_sae(folder), numbers(30, D, seed=5, scale=2.0)
    scores = x @ tensors["encoder.weight"].t() + tensors["encoder.bias"]
    acts = torch.zeros_like(scores).scatter(1, scores.topk(4).indices, scores.topk(4).values.relu())
    expected = acts @ tensors["W_dec"] + tensors["b_dec"] + x @ tensors["W_skip"].t()
    torch.testing.assert_close(sae(x), expected, rtol=1e-5, atol=1e-5)
    assert sae.config.reads == "input" and sae.config.hookpoint == folder.name


@pytest.mark.parametrize(
    "values, said",
    [
        ({"architecture": "gated"}, "'gated' is not read, only standard, topk"),
        ({"normalize_activations": "constant_norm_rescale"}, "fold it into the weights"),
        ({"reshape_activations": "hook_z"}, "heads are not apart"),
        ({"architecture": "transcoder", "d_out": 7}, "got 32 and 7"),
        ({"architecture": "topk"}, "k must be a whole number"),
        ({"d_sae": 47}, r"encoder.weight must be \(47, 32\)"),
    ],
)
def test_saelens_folders_that_are_refused(tmp_path, values, said):
    saelens_folder(tmp_path / "published", **values)
    with pytest.raises(ValueError, match=said):
        load_sae(tmp_path / "published")


def test_dictionaries_that_are_refused(tmp_path):
    def refused(said, name="transcoder_img_0", **changed):
        state = {**difffract_state(), **changed}
        torch.save({name: value for name, value in state.items() if value is not None}, tmp_path / f"{name}.pt")
        with pytest.raises(ValueError, match=said):
            convert_published(tmp_path / f"{name}.pt", tmp_path / "ours")
        assert not (tmp_path / "ours").exists()

    refused("has no 'mod_linear.bias'", **{"mod_linear.bias": None})
    refused(r"decoder.weight must be \(32, 48\)", **{"decoder.weight": numbers(L, D)})
    refused(r"modulation.mod_linear.weight must be \(64, 8\)", **{"mod_linear.weight": numbers(D, T)})
    refused("none of DifFRACT's names", name="transcoder_6")
    refused("damaged, or holds more than tensors", **{"encoder.bias": print})
    with pytest.raises(ValueError, match="holds nothing that is converted"):
        convert_published(tmp_path / "ours", tmp_path / "ours")
    for options in ({"source": "update"}, {"input_unit_norm": True}):
        with pytest.raises(ValueError, match="a transcoder encodes a module's input"):
            SAEConfig(D, L, 4, transcode=True, **options)
    with pytest.raises(ValueError, match="needs time_embed_dim"):
        TimeConditionedAutoencoder(SAEConfig(D, L, 4))
    assert SparseAutoencoder(SAEConfig(D, L, 4)).modulation is None


def test_another_time_embedding(tmp_path):
    """Files whose configuration names another one than their weights have."""
    torch.save(difffract_state(), tmp_path / "transcoder_img_0.pt")
    convert_published(tmp_path / "transcoder_img_0.pt", tmp_path / "ours")
    (folder,) = (path.parent for path in (tmp_path / "ours").rglob("cfg.json"))
    file, values = folder / "cfg.json", json.loads((folder / "cfg.json").read_text())
    assert (values["d_in"], values["num_latents"], values["time_embed_dim"]) == (D, L, T)
    for dim, said in ((2 * T, rf"must be .*{2 * T}.* by its configuration"), (1, "time_embed_dim must be at least 2")):
        file.write_text(json.dumps({**values, "time_embed_dim": dim}))
        with pytest.raises(ValueError, match=said):
            load_sae(folder)
    file.write_text(json.dumps({name: value for name, value in values.items() if name != "time_embed_dim"}))
    with pytest.raises(ValueError, match="which no configuration of ours has"):
        load_sae(folder)
