"use strict";
// Sorting, filters, and what is known of a cell. Without this the page can be read all the same.
const $ = (selector, within = document) => within.querySelector(selector);
const $$ = (selector, within = document) => [...within.querySelectorAll(selector)];
const make = (tag, content = "", attributes = {}) => {
  const made = document.createElement(tag);
  made.append(...(Array.isArray(content) ? content : [content]));
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
};
const data = JSON.parse($("#data").textContent);
$$(".enhanced").forEach((part) => (part.hidden = false));
$$("form").forEach((form) => form.method !== "dialog" && form.addEventListener("submit", (event) => event.preventDefault()));

// Light and dark: the system's choice until the reader makes one
{
  const button = $("#theme"), root = document.documentElement, system = matchMedia("(prefers-color-scheme: dark)");
  const stored = () => { try { return localStorage.getItem("sdae-theme"); } catch { return null; } };
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const show = () => button.setAttribute("aria-pressed", String(dark()));
  if (["light", "dark"].includes(stored())) root.dataset.theme = stored();
  show();
  system.addEventListener("change", show);
  button.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    try { localStorage.setItem("sdae-theme", root.dataset.theme); } catch { /* for this visit, then */ }
    show();
  });
}

// Claims: by verdict and text
{
  const rows = $$("#claims-table tbody tr"), verdict = $("#claims-verdict"), text = $("#claims-text");
  const words = rows.map((row) => row.textContent.toLowerCase());
  const filter = () => {
    const wanted = text.value.trim().toLowerCase();
    let shown = 0;
    rows.forEach((row, n) => {
      row.hidden = (verdict.value && row.dataset.verdict !== verdict.value) || !words[n].includes(wanted);
      shown += !row.hidden;
    });
    $("#claims-count").textContent = `${shown} of ${rows.length} claims`;
  };
  verdict.addEventListener("change", filter);
  text.addEventListener("input", filter);
  filter();
}

// Runs: ten thousand rows are sorted and filtered as data, and one page of them is drawn
const runs = (() => {
  const PAGE = 50, { columns, rows } = data.runs, of = (name) => columns.findIndex((column) => column.name === name);
  const texts = rows.map((row) => row.join(" ").toLowerCase());
  const stage = $("#runs-stage"), state = $("#runs-state"), text = $("#runs-text"), body = $("#runs-table tbody");
  const kind = ({ digits }) => (digits === null ? "text" : "number");
  const shape = (value, { digits }) => (typeof value === "number" ? value.toFixed(digits) : value ?? "");
  let sorted = { column: 0, down: false }, shown = [], page = 0, marked = null;
  for (const [select, name] of [[stage, "stage"], [state, "state"]])
    for (const value of [...new Set(rows.map((row) => row[of(name)]))].sort()) select.append(make("option", value ?? ""));
  const heads = columns.map((column, n) => {
    const button = make("button", column.label, { type: "button" });
    button.addEventListener("click", () => {
      sorted = { column: n, down: sorted.column === n && !sorted.down };
      refresh();
    });
    return make("th", button, { scope: "col", class: kind(column) });
  });
  $("#runs-table thead").append(make("tr", heads));
  const refresh = () => {
    const wanted = text.value.trim().toLowerCase(), { column, down } = sorted;
    const keys = rows.map((row) => row[column]), sign = down ? -1 : 1;
    const compare = columns[column].digits !== null ? (a, b) => a - b : (a, b) => (a < b ? -1 : +(a > b));
    shown = [...rows.keys()].filter((n) =>
      (!stage.value || rows[n][of("stage")] === stage.value) && (!state.value || rows[n][of("state")] === state.value) &&
      texts[n].includes(wanted));
    const empty = (n) => keys[n] === null || keys[n] === ""; // what is unknown comes last, whichever way
    shown.sort((a, b) => empty(a) - empty(b) || (empty(a) ? 0 : sign * compare(keys[a], keys[b])) || a - b);
    heads.forEach((head, n) => head.setAttribute("aria-sort", n !== column ? "none" : down ? "descending" : "ascending"));
    $("#runs-count").textContent = `${shown.length.toLocaleString("en")} of ${rows.length.toLocaleString("en")} runs`;
    turn(0);
  };
  const turn = (to) => {
    const pages = Math.max(1, Math.ceil(shown.length / PAGE));
    page = Math.min(Math.max(to, 0), pages - 1);
    body.replaceChildren(...shown.slice(page * PAGE, (page + 1) * PAGE).map((n) => {
      const cells = rows[n].map((value, c) =>
        make(c ? "td" : "th", shape(value, columns[c]), c ? { class: kind(columns[c]) } : { scope: "row" }));
      return make("tr", cells, { "data-run": rows[n][0], ...(n === marked ? { class: "found", tabindex: -1 } : {}) });
    }));
    $("#runs-page").textContent = `Page ${page + 1} of ${pages.toLocaleString("en")}`;
    $("#runs-previous").disabled = page === 0;
    $("#runs-next").disabled = page === pages - 1;
  };
  $("#runs-previous").addEventListener("click", () => turn(page - 1));
  $("#runs-next").addEventListener("click", () => turn(page + 1));
  for (const select of [stage, state]) select.addEventListener("change", refresh);
  text.addEventListener("input", refresh);
  refresh();
  const places = new Map(rows.map((row, n) => [row[0], n]));
  return {
    has: (id) => places.has(id),
    goto: (id) => {
      stage.value = state.value = text.value = "";
      marked = places.get(id);
      refresh();
      turn(Math.floor(shown.indexOf(marked) / PAGE));
      const row = $("tr.found", body);
      row.scrollIntoView({ block: "center" });
      row.focus({ preventScroll: true });
    },
  };
})();

// What is known of a cell, in a dialog
{
  const dialog = $("#provenance"), body = $("#provenance-body");
  const label = (key) => key.replaceAll("_", " ").replace(/^gpu/, "GPU").replace(/^./, (first) => first.toUpperCase());
  const plain = (value) => value === null || typeof value !== "object";
  const node = (value) => {
    if (value === null || value === "") return "–";
    if (typeof value === "number") return String(Number.isInteger(value) ? value : +value.toPrecision(6));
    if (typeof value === "boolean") return value ? "yes" : "no";
    if (typeof value === "string") return value.includes("\n") ? make("pre", value, { tabindex: 0 }) : runs.has(value) ? link(value) : value;
    if (!Array.isArray(value)) return list(value);
    if (!value.length) return "–";
    if (value.every(plain)) {
      const parts = value.map(node), short = value.every((item) => String(item).length < 8);
      return short ? parts.join(", ") : make("ul", parts.map((part) => make("li", part)));
    }
    if (value.every((item) => !plain(item) && item.title)) return make("div", value.map(folded));
    const keys = [...new Set(value.flatMap((item) => (plain(item) ? [] : Object.keys(item))))];
    const narrow = keys.length <= 5 && value.every((item) => !plain(item) && Object.values(item).every(plain));
    return narrow ? grid(keys, value) : make("ul", value.map((item) => make("li", node(item))));
  };
  const folded = ({ title, ...facts }, n) => {
    const part = make("details", [make("summary", title), list(facts)]);
    part.open = n === 0;
    return part;
  };
  const link = (id) => {
    const button = make("button", id, { type: "button", class: "id" });
    button.addEventListener("click", () => { dialog.close(); runs.goto(id); });
    return button;
  };
  const grid = (keys, rows) => make("div", make("table", [
    make("thead", make("tr", keys.map((key) => make("th", label(key), { scope: "col" })))),
    make("tbody", rows.map((row) => make("tr", keys.map((key) => make("td", node(row[key] ?? null)))))),
  ], { class: "list" }), { class: "wide" });
  const list = (values) => make("dl", Object.entries(values).map(([key, value]) =>
    make("div", [make("dt", label(key)), make("dd", node(value))])), { class: "known" });
  const open = (cell) => {
    const { title, known } = data.cells[cell];
    $("#provenance-title").textContent = title;
    body.replaceChildren(list(known));
    dialog.showModal();
    dialog.scrollTop = 0;
    $("#provenance-title").focus();
  };
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  for (const place of $$("td[data-cell]")) {
    if (!place.textContent.trim() || !(place.dataset.cell in data.cells)) continue;
    const button = make("button", [...place.childNodes], { type: "button", "aria-haspopup": "dialog" });
    button.addEventListener("click", () => open(place.dataset.cell));
    place.replaceChildren(button);
  }
}

// Print shows all
addEventListener("beforeprint", () => $$("details").forEach((part) => (part.open = true)));
