// A click on a column's head sorts by it: numbers by value, text by alphabet, empty cells last; a second click turns the order.
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const ascending = head.getAttribute("aria-sort") !== "ascending";
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    const isNumber = head.classList.contains("number");
    const key = (row) => {
      const cell = row.cells[column];
      return isNumber ? (cell.dataset.value === undefined ? null : Number(cell.dataset.value)) : cell.textContent || null;
    };
    const compare = (a, b) => {
      if (a === null || b === null) return (a === null) - (b === null);
      const order = isNumber ? a - b : a.localeCompare(b);
      return ascending ? order : -order;
    };
    const body = table.tBodies[0];
    const rows = [...body.rows].map((row) => [key(row), row]);
    body.append(...rows.sort(([a], [b]) => compare(a, b)).map(([, row]) => row));
  }));
}
