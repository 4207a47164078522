"use strict";
/* Charts from the page's JSON; tables that sort by a click on a head; answers that are filtered as one types. */
(function () {
  const data = document.getElementById("charts");
  if (data && typeof Bokeh !== "undefined") {
    const items = JSON.parse(data.textContent);
    for (const name of Object.keys(items)) Bokeh.embed.embed_item(items[name], name);
  }
  const value = (row, column) => {
    const text = row.cells[column].textContent.trim();
    const number = Number(text.replace(/,/g, ""));
    return text !== "" && !Number.isNaN(number) ? number : text.toLowerCase();
  };
  const compare = (a, b) => (typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a === "number" ? -1 : 1);
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.rows[0].cells];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        for (const other of heads) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const rows = [...table.rows].slice(1);
        rows.sort((a, b) => (down ? -1 : 1) * compare(value(a, column), value(b, column)));
        rows[0]?.parentNode.append(...rows);
      });
    });
  }
  for (const box of document.querySelectorAll(".filter")) {
    const group = box.closest("section");
    const [words, kind] = [box.querySelector("input"), box.querySelector("select")];
    const shown = box.querySelector("output");
    const parts = [...group.querySelectorAll("[data-kind]")];
    const rows = parts.filter((part) => part.tagName === "TR");
    const apply = () => {
      const wanted = words.value.trim().toLowerCase();
      for (const part of parts) {
        const fits = (!kind.value || part.dataset.kind === kind.value) && part.textContent.toLowerCase().includes(wanted);
        part.hidden = !fits;
      }
      shown.textContent = rows.filter((row) => !row.hidden).length + " of " + rows.length;
    };
    box.hidden = false;
    words.addEventListener("input", apply);
    kind.addEventListener("change", apply);
    apply();
  }
})();
