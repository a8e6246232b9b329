"use strict";
const words = document.getElementById("words"), order = document.getElementById("order");
const main = document.getElementById("cards"), cards = [...main.children];
const rules = {
  place: () => 0,
  density: (a, b) => a.dataset.density - b.dataset.density,
  label: (a, b) => !a.dataset.label - !b.dataset.label || a.dataset.label.localeCompare(b.dataset.label),
};
function show() {
  const asked = words.value.toLowerCase().split(/\s+/).filter(Boolean);
  let count = 0;
  for (const card of cards) {
    card.hidden = !asked.every((word) => card.dataset.words.includes(word));
    count += !card.hidden;
  }
  main.append(...[...cards].sort(rules[order.value]));
  document.getElementById("count").textContent = `${count} shown`;
  document.getElementById("none").hidden = count > 0;
}
words.addEventListener("input", show);
order.addEventListener("change", show);
document.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
show();
