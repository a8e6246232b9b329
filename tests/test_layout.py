import dataclasses

import pytest
import torch

from imgdit import Frame, FrameLayout, TextFrame
from imgdit.compat import FakeTensorMode
from imgdit.layout import RowGroup, put_rows, take_rows


def test_ids_of_a_plain_frame_are_fluxs():
    ids = Frame((2, 3)).ids()
    assert ids.dtype == torch.float32
    assert ids.tolist() == [[0, r, c] for r in range(2) for c in range(3)]


def test_ids_of_a_compact_shifted_frame():
    frame = Frame((2, 2), index=3, offset=(0, -2), scale=2.0)
    assert frame.ids().tolist() == [[3, r, c] for r in (0.5, 2.5) for c in (-3.5, -1.5)]


def test_mask_keeps_the_places_of_the_tokens_left():
    mask = torch.tensor([[True, False], [False, True]])
    frame = Frame((2, 2), mask=mask)
    assert frame.length == 2
    assert frame.ids().tolist() == [[0, 0, 0], [0, 1, 1]]


def test_joint_conditions_see_all_but_each_other():
    layout = FrameLayout.build(
        [Frame((1, 2)), Frame((1, 1), 0.0, "a", "joint"), Frame((1, 1), 0.0, "b", "joint")], text_length=3
    )
    assert layout.visible.int().tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 1]]
    assert layout.groups == (
        RowGroup(queries=(slice(0, 5),), keys=(slice(0, 7),), ranks=(0,)),
        RowGroup(queries=(slice(5, 6),), keys=(slice(0, 6),), ranks=(1,)),
        RowGroup(queries=(slice(6, 7),), keys=(slice(0, 5), slice(6, 7)), ranks=(2,)),
    )
    assert layout.frozen == frozenset()


def test_frozen_is_derived():
    def frozen(*sees):
        frames = [Frame((1, 1)), *(Frame((1, 1), 0.0, name, rule) for name, rule in zip("abc", sees))]
        return FrameLayout.build(frames, 1).frozen

    assert frozen("self", "self") == {2, 3}
    assert frozen("self", "joint") == {2}
    assert frozen("all") == frozenset()
    visible = torch.eye(4, dtype=torch.bool)
    visible[3, 2] = True  # a clean frame that sees only a frozen one is frozen too
    frames = [Frame((1, 1)), Frame((1, 1), 0.0), Frame((1, 1), 0.0)]
    assert FrameLayout.build(frames, 1, visible=visible).frozen == {0, 2, 3}, "this text sees only itself"
    visible[2, 1] = True  # … and not if that one sees what is generated
    assert FrameLayout.build(frames, 1, visible=visible).frozen == {0}


def test_without_frozen_reads_them_from_the_cache():
    layout = FrameLayout.build([Frame((1, 2)), Frame((1, 3), 0.0, "a", "self"), Frame((1, 4))], 1).without_frozen()
    assert layout.lengths == (2, 4)
    assert layout.image_length == 6
    assert layout.groups == (RowGroup((slice(0, 7),), (slice(0, 7),), (slice(0, 3),), ranks=(0,)),)
    assert layout.rows == (slice(0, 2), slice(2, 6))
    assert layout.frozen_rows() == ()


def test_expand_holds_given_frames():
    layout = FrameLayout.build([Frame((1, 1)), Frame((1, 1), sigma=0.0), Frame((1, 1))], 1)
    levels = layout.expand(torch.tensor([0.5, 0.25]), [None, 0.0, None])
    assert levels.tolist() == [[0.5, 0.0, 0.5], [0.25, 0.0, 0.25]]
    own = torch.rand(2, 3)
    assert layout.expand(own, [None, 0.0, None]) is own
    with pytest.raises(ValueError, match="got 2 values per sample, expected one per frame: 3"):
        layout.expand(own[:, :2])


def test_packed_scenes_do_not_see_each_other():
    a = FrameLayout.build([Frame((1, 2)), Frame((1, 1), 0.0, "c", "self")], 3)
    b = FrameLayout.build([Frame((2, 2))], 1)
    packed = FrameLayout.pack([a, b])
    assert packed.is_packed and packed.text_lengths == (3, 1) and packed.lengths == (2, 1, 4)
    assert packed.visible.int().tolist() == [
        [1, 0, 1, 1, 0],
        [0, 1, 0, 0, 1],
        [1, 0, 1, 1, 0],
        [0, 0, 0, 1, 0],
        [0, 1, 0, 0, 1],
    ]
    assert packed.expand(torch.tensor([0.1, 0.2])).tolist() == [[pytest.approx(x) for x in (0.1, 0.1, 0.2)]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Frame((0, 3)), "at least one row"),
        (lambda: Frame((1, 1), sigma=2.0), r"noise level in \[0, 1\]"),
        (lambda: Frame((1, 1), sees="others"), "'all', 'joint' or 'self', got 'others'"),
        (lambda: Frame((1, 1), scale=0), "must be positive"),
        (lambda: Frame((2, 2), mask=torch.ones(4, dtype=torch.bool)), r"\(2, 2\) \(rows, columns\)"),
        (lambda: Frame((2, 2), mask=torch.zeros(2, 2, dtype=torch.bool)), "selects no token"),
        (lambda: FrameLayout.build([], 1), "at least one frame"),
        (lambda: FrameLayout.build([Frame((1, 1))], -1), "counts tokens"),
        (lambda: FrameLayout.build([Frame((1, 1))]), "needs a text"),
        (lambda: FrameLayout.build([TextFrame(2)]), "or a text that is generated"),
        (lambda: TextFrame(2, sigma=1.5), r"noise level in \[0, 1\]"),
        (lambda: TextFrame(2, sees="others"), "'all', 'joint' or 'self', got 'others'"),
        (lambda: TextFrame(2, None, block=-1), "numbered from 0"),
        (lambda: TextFrame(2, None, keep=torch.ones(3, dtype=torch.bool)), r"shape \(2,\) or \(batch, 2\)"),
        (lambda: TextFrame(2, keep=torch.ones(2, dtype=torch.bool)), "clean at sigma=0.0"),
        (lambda: FrameLayout.build([Frame((1, 1))], 1, visible=torch.ones(3, 3).bool()), r"shape \(2, 2\)"),
        (lambda: FrameLayout.build([Frame((1, 1))], 1, visible=torch.zeros(2, 2).bool()), "at least itself"),
        (lambda: FrameLayout.pack([]), "nothing to pack"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_texts_have_the_noisiest_level_of_their_frames():
    held = [0.0, None, 0.0, None]  # of the text, then of the frames
    layout = FrameLayout.build([Frame((1, 1)), Frame((1, 1), sigma=0.0), Frame((1, 1))], 1)
    frames, texts = layout.segment_levels(torch.tensor([0.5, 0.25]), held)
    assert frames.tolist() == [[0.5, 0.0, 0.5], [0.25, 0.0, 0.25]] and texts.tolist() == [[0.5], [0.25]]
    frames, texts = layout.segment_levels(torch.tensor([[0.1, 0.9, 0.2]], dtype=torch.bfloat16), held)
    assert frames.dtype == torch.float32 and texts.tolist() == [[frames.max().item()]]
    alone = FrameLayout.build([Frame((1, 1))], 1)
    assert len({id(levels) for levels in alone.segment_levels(torch.tensor([0.5]), [0.0, None])}) == 1
    packed = FrameLayout.pack([layout, alone])
    frames, texts = packed.segment_levels(torch.tensor([0.5, 0.25]), [0.0, *held, None])
    assert frames.tolist() == [[0.5, 0.0, 0.5, 0.25]] and texts.tolist() == [[0.5, 0.25]]
    frames, texts = packed.segment_levels(torch.tensor([[0.5, 0.75, 0.25, 0.125]]), [0.0, *held, None])
    assert texts.tolist() == [[0.75, 0.125]]


def caption(length=4, **options):
    return TextFrame(length, None, **options)


def test_a_layout_of_text_frames_is_a_layout_of_text_lengths():
    frames = [Frame((1, 2)), Frame((1, 3), 0.0, "a", "self"), Frame((1, 1), 0.0, "b", "joint", strength=0.5)]
    old, new = FrameLayout.build(frames, 5), FrameLayout.build([TextFrame(5), *frames])
    assert torch.equal(old.visible, new.visible) and old.frozen == new.frozen and old.text_lengths == new.text_lengths
    assert torch.equal(old.dense_bias(), new.dense_bias()) and not new.text_positions().any()
    assert new.claimed == {"a", "b"} and new.predicted_texts == ()
    order = FrameLayout.build([frames[0], TextFrame(5), *frames[1:]])
    assert torch.equal(order.visible, new.visible), "texts come first, wherever they are named"


def test_an_image_that_sees_itself_is_frozen_while_its_caption_is_generated():
    image = Frame((2, 2), sigma=0.0, sees="self")
    layout = FrameLayout.build([image, caption(3, adapter="text")])
    assert layout.frozen == {1} and layout.claimed == {"text"} and layout.predicted == ()
    assert layout.predicted_texts == (slice(0, 3),) and layout.text_positions().tolist() == [0, 1, 2]
    rest = layout.without_frozen()
    assert rest.lengths == () and rest.image_length == 0 and rest.ids().shape == (0, 3)
    assert rest.groups == (RowGroup((slice(0, 3),), (slice(0, 3),), (slice(0, 4),), ranks=(0,)),)
    everything = FrameLayout.build([Frame((2, 2), sigma=0.0), caption(3)])
    assert everything.frozen == frozenset(), "an image that sees the caption changes with it"


def test_levels_of_texts():
    frames = [Frame((1, 1), sigma=0.0), Frame((1, 1), sigma=0.25)]
    layout = FrameLayout.build([TextFrame(2), TextFrame(2, sees="self"), caption(), *frames])
    held = [segment.sigma for segment in layout.segments]
    of_frames, texts = layout.segment_levels(torch.tensor([0.5]), held, torch.tensor([0.75]))
    assert of_frames.tolist() == [[0.0, 0.25]]
    assert texts.tolist() == [[0.5, 0.0, 0.75]], "a prompt follows the run where it sees what is generated"
    assert layout.segment_levels(torch.tensor([0.5]), held)[1].tolist() == [[0.5, 0.0, 0.5]]
    both = FrameLayout.build([caption(), Frame((1, 1))])
    of_frames, texts = both.segment_levels(torch.tensor([0.5, 0.25]), [None, None], torch.tensor([0.1, 0.9]))
    assert of_frames.tolist() == [[0.5], [0.25]] and texts[:, 0].tolist() == pytest.approx([0.1, 0.9])
    packed = FrameLayout.pack([both, layout])
    levels = packed.segment_levels(torch.tensor([0.5, 0.25]), [None, *held[:3], None, *held[3:]])
    assert levels[0].tolist() == [[0.5, 0.0, 0.25]] and levels[1].tolist() == [[0.5, 0.25, 0.0, 0.25]]


def test_blocks_see_earlier_blocks_and_are_frozen_when_done():
    image = Frame((1, 2), sigma=0.0, sees="self")
    first = FrameLayout.build([image, *TextFrame.in_blocks(6, 2)])
    assert first.text_lengths == (2,) and first.frozen == {1}
    third = FrameLayout.build([image, *TextFrame.in_blocks(6, 2, done=2, adapter="text")])
    assert third.visible.int().tolist() == [[1, 0, 0, 1], [1, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 1]]
    assert third.frozen == {0, 1, 3} and third.text_positions().tolist() == [0, 1, 2, 3, 4, 5]
    rest = third.without_frozen()
    assert rest.text_lengths == (2,) and rest.text_positions().tolist() == [4, 5] and rest.live_texts == (2,)
    levels = third.segment_levels(torch.tensor([0.0]), [s.sigma for s in third.segments], torch.tensor([0.5]))
    assert levels[1].tolist() == [[0.0, 0.0, 0.5]]
    with pytest.raises(ValueError, match="multiple of block_length with a block left"):
        list(TextFrame.in_blocks(6, 2, done=3))


def test_what_follows_from_a_layout_is_built_once():
    layout, built = FrameLayout.build([Frame((1, 2))], 1), []

    def ones(dtype=torch.float32):
        return layout.kept(("ones", dtype), lambda: built.append(dtype) or torch.ones(2, dtype=dtype))

    assert ones() is ones() and ones(torch.float64).dtype == torch.float64 and built == [torch.float32, torch.float64]
    with torch.inference_mode():
        assert ones() is ones() and ones().is_inference()
    assert not ones().is_inference(), "a tensor of inference mode would end in a training step"
    with FakeTensorMode():
        assert ones(torch.int8) is not ones(torch.int8), "a tensor without memory would end in a real step"
    assert type(ones(torch.int8)) is torch.Tensor
    for number in range(100):
        layout.kept(number, lambda: torch.ones(2))
    assert len(layout._kept) <= 32
    other = dataclasses.replace(layout, texts=(TextFrame(2),))
    assert not other._kept and other.groups != layout.groups


def test_rows_are_taken_and_put_back():
    x, rows = torch.arange(12.0).view(2, 6), (slice(0, 1), slice(3, 5))
    taken = take_rows(x, rows)
    assert taken.tolist() == [[0, 3, 4], [6, 9, 10]] and take_rows(x, rows[1:]).tolist() == [[3, 4], [9, 10]]
    assert torch.equal(put_rows(x, rows, taken), x)
    changed = put_rows(x, rows, (taken + 1).double())
    assert changed.dtype == torch.float64 and changed[0].tolist() == [1, 1, 2, 4, 5, 5] and x[0, 0] == 0
