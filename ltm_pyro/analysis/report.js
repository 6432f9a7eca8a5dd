"use strict";
const cards = document.getElementById("cards");
const all = [...cards.children];
const search = document.getElementById("search");
const sort = document.getElementById("sort");
const hint = document.getElementById("hint");
const texts = new Map(all.map((card) => [card, card.textContent.toLowerCase()]));

function show() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  let found = 0;
  for (const card of all) {
    card.hidden = !words.every((word) => texts.get(card).includes(word));
    found += !card.hidden;
  }
  document.getElementById("count").textContent = words.length ? `${found} of ${all.length}` : "";
}

function order() {
  const key = sort.value.replace("pareto_k", "paretoK");
  const value = (card) => Number(card.dataset[key]);
  const last = (x) => (Number.isNaN(x) ? Infinity : x); // no number is the largest k-hat
  const sign = key === "index" || key === "elbo" ? 1 : -1; // the doubtful ones first
  const by = (a, b) => (last(value(a)) === last(value(b)) ? 0 : sign * (last(value(a)) < last(value(b)) ? -1 : 1));
  cards.append(...[...all].sort(by));
}

function point(event) {
  const place = event.target.closest("[data-name]");
  hint.hidden = !place;
  if (place) hint.textContent = place.dataset.name;
}

search.addEventListener("input", show);
search.form.addEventListener("submit", (event) => event.preventDefault());
sort.addEventListener("change", order);
document.addEventListener("mouseover", point);
document.addEventListener("focusin", point);
window.addEventListener("hashchange", () => {
  const card = document.getElementById(location.hash.slice(1));
  if (card && card.hidden) {
    search.value = "";
    show();
    card.scrollIntoView();
  }
});
search.value = "";
sort.value = "index";
