// A click on the head of a column sorts the rows of its table: numbers as numbers, empty cells last.
document.querySelectorAll("table.sortable th").forEach((head) => {
  // Not a <button>: with one in it Chromium does not print the head again on each page.
  const button = document.createElement("span");
  button.role = "button";
  button.tabIndex = 0;
  button.append(...head.childNodes);
  head.append(button);
  head.setAttribute("aria-sort", "none");
  button.addEventListener("click", () => sort(head));
  button.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    sort(head);
  });
});

function sort(head) {
  const down = head.getAttribute("aria-sort") === "ascending";
  for (const other of head.parentNode.children) other.setAttribute("aria-sort", "none");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const body = head.closest("table").tBodies[0];
  const rows = [...body.rows].map((row) => ({ row, key: key(row.cells[head.cellIndex]) }));
  rows.sort((a, b) => {
    if (a.key === "" || b.key === "") return (a.key === "") - (b.key === "");
    return (down ? -1 : 1) * compare(a.key, b.key);
  });
  body.append(...rows.map(({ row }) => row));
}

// data-sort holds the number behind a text such as "12.5%".
function key(cell) {
  const number = cell.dataset.sort;
  if (number === undefined) return cell.textContent.trim();
  return number === "" ? "" : Number(number);
}

function compare(a, b) {
  if (typeof a === "number" && typeof b === "number") return a - b;
  return String(a).localeCompare(String(b), undefined, { numeric: true });
}
