"use strict";
// Sorting by any column and searching for a learner; without this script the page shows everything all the same.
for (const table of document.querySelectorAll("table.map")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const numbers = new Intl.Collator(undefined, { numeric: true });
  const value = (row, column) => row.cells[column].dataset.value ?? row.cells[column].textContent;

  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const rows = [...body.rows].sort((a, b) => numbers.compare(value(a, column), value(b, column)));
    body.append(...(up ? rows : rows.reverse()));
  }));
}
document.querySelector("#search").addEventListener("input", event => {
  const words = event.target.value.toLowerCase();
  for (const row of document.querySelectorAll("table.map tbody tr"))
    row.hidden = !row.cells[0].textContent.toLowerCase().includes(words);
});
