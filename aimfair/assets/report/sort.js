"use strict";
// A click on a heading sorts its table: ascending, descending, and as it was. Without scripts, tables stay as they are.
const NUMBER = /^[(\[]?\s*([+\-−]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:e[+\-−]?\d+)?)(?=$|[\s%±)\],;])/i;
const WORDS = new Intl.Collator("en", {numeric: true});

function numberIn(text) { // the leading number of "−1,600.5 ± 2" or "[0.2, 0.4]"; NaN where there is none
  const found = NUMBER.exec(text);
  return found && /\d/.test(found[1]) ? Number(found[1].replaceAll(",", "").replaceAll("−", "-")) : NaN;
}

function sorted(rows, column, sign) { // equal ones keep their order, empty ones come last
  const keyed = rows.map(row => [row, row.cells[column].textContent.trim()]);
  const given = keyed.filter(([, text]) => !/^(|–|nan)$/i.test(text));
  const numbers = given.every(([, text]) => !Number.isNaN(numberIn(text)));
  const compare = numbers ? (a, b) => numberIn(a) - numberIn(b) : WORDS.compare;
  given.sort(([, a], [, b]) => sign * compare(a, b));
  return [...given, ...keyed.filter(pair => !given.includes(pair))].map(([row]) => row);
}

for (const table of document.querySelectorAll(".scroll > table")) {
  const headings = [...table.tHead.rows[0].cells], body = table.tBodies[0], before = [...body.rows];
  if (before.length < 2) continue;
  headings.forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.title = "sort";
    button.append(...heading.childNodes);
    if (!button.textContent.trim()) button.setAttribute("aria-label", "sort by name");
    heading.append(button);
    button.addEventListener("click", () => {
      const next = {ascending: "descending", descending: null}[heading.getAttribute("aria-sort")];
      const order = next === undefined ? "ascending" : next;
      headings.forEach(other => other.removeAttribute("aria-sort"));
      if (order) heading.setAttribute("aria-sort", order);
      body.append(...(order ? sorted([...body.rows], column, order === "ascending" ? 1 : -1) : before));
    });
  });
}

let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not([open])")];
  opened.forEach(details => { details.open = true; });
});
addEventListener("afterprint", () => opened.splice(0).forEach(details => { details.open = false; }));
