// Tables are made of text nodes: nothing from a file is ever read as HTML.
function byId(id) {
  return document.getElementById(id);
}

function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// columns: names, the first one names the row; rows: arrays of text, nodes or {text, note, best}.
function table(caption, columns, rows, options = {}) {
  const head = element("tr", {}, ...columns.map((name, i) =>
    element("th", { scope: "col", class: i < (options.names || 1) ? "name" : "" }, name)));
  const body = rows.map((row, r) => {
    const cells = row.map((cell, i) => tableCell(cell, i, i < (options.names || 1)));
    const total = options.total && r === rows.length - 1;
    return element("tr", total ? { class: "total" } : {}, ...cells);
  });
  return element("table", {}, element("caption", options.hidden ? { class: "visually-hidden" } : {}, caption),
    element("thead", {}, head), element("tbody", {}, ...body));
}

function tableCell(cell, index, isName) {
  const content = cell === null || cell === undefined ? "–" : cell;
  const tag = index === 0 ? "th" : "td";
  const made = element(tag, index === 0 ? { scope: "row" } : {});
  made.className = isName ? "name" : "";
  if (typeof content === "object" && !(content instanceof Node)) {
    made.append(content.text);
    if (content.note) made.append(element("small", {}, content.note));
    if (content.best) made.classList.add("best");
  } else {
    made.append(content);
  }
  return made;
}

function show(id, ...nodes) {
  byId(id).replaceChildren(...nodes);
}

// Filled when it is opened, and again while it is open: a page holds thousands of numbers.
function onOpen(id, make) {
  const box = byId(id), details = box.closest("details");
  const fill = () => { if (details.open || printing) show(id, ...[make()].flat()); };
  details.ontoggle = fill;
  fill();
}

function meter(value) {
  const bar = element("i");
  bar.style.width = (100 * Math.min(1, value)).toFixed(1) + "%";
  return element("span", { class: "bar", "aria-hidden": "true" }, bar);
}

function withMeter(text, value) {
  const box = document.createDocumentFragment();
  box.append(text, meter(value));
  return box;
}
