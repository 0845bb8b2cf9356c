
"use strict";
const filter = document.getElementById("filter");
if (filter) {
  filter.hidden = false;
  filter.addEventListener("click", (event) => {
    const chosen = event.target.closest("button");
    if (!chosen) return;
    for (const button of filter.querySelectorAll("button")) {
      button.setAttribute("aria-pressed", String(button === chosen));
    }
    const verdict = chosen.dataset.verdict;
    for (const card of document.querySelectorAll("#gallery .card")) {
      card.hidden = verdict !== "" && card.dataset.verdict !== verdict;
    }
  });
}
addEventListener("beforeprint", () => {
  for (const picture of document.querySelectorAll("img[loading=lazy]")) picture.loading = "eager";
});
