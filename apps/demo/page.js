() => {
  const inSight = (selector) =>
    [...document.querySelectorAll(selector)].find((element) => element.offsetParent !== null && !element.disabled);

  // Ctrl+Enter presses the main button of the open tab, Esc its Stop.
  document.addEventListener("keydown", (event) => {
    const starts = event.key === "Enter" && (event.ctrlKey || event.metaKey);
    if (!starts && event.key !== "Escape") return;
    const button = inSight(starts ? "button.make" : "button.halt");
    if (button === undefined) return;
    event.preventDefault();
    if (starts) document.activeElement.blur(); // a number that is still being typed is taken
    setTimeout(() => button.click(), starts ? 50 : 0);
  }, true);

  document.addEventListener("click", (event) => {
    if (event.target.closest("#theme")) document.body.classList.toggle("dark");
    if (!event.target.closest("button.make, .uses button, .history button")) return;
    // Where the result is not in the window, go there. A page that changes its height stops the way there: look again,
    // unless the person scrolls.
    let left = false;
    for (const by of ["wheel", "touchmove"]) addEventListener(by, () => { left = true; }, { once: true, passive: true });
    for (const wait of [150, 900, 1800]) {
      setTimeout(() => {
        const result = inSight(".main-result");
        if (result === undefined || left) return;
        const { top, bottom } = result.getBoundingClientRect();
        if (top < 0 || bottom > innerHeight + 0.25 * (bottom - top)) result.scrollIntoView({ behavior: "smooth" });
      }, wait);
    }
  });
}
