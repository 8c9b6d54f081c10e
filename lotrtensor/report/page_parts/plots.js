// How every plot looks, in light, dark and print.
let printing = false;

function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
}

function narrow() {
  return window.innerWidth < 700;
}

const STYLES = {
  compressed: { color: "bits", dash: "solid", width: 4 },
  "terms-in-bits": { color: "bits", dash: "dot", width: 2 },
  "shared-in-bits": { color: "bits", dash: "dash", width: 2 },
  "lotr-by-type": { color: "accent", dash: "solid", width: 3.5 },
  "lotr-by-shape": { color: "shape", dash: "dash", width: 2 },
  "lotr-clustered": { color: "clusters", dash: "dashdot", width: 2 },
  "lora-best-ranks": { color: "lora", dash: "solid", width: 3 },
  "lora-one-rank": { color: "lora", dash: "dot", width: 2 },
};

// Twelve hues that colour-blind readers can tell apart in pairs with the dashes beside them.
const HUES = ["#3b7dd8", "#d9822b", "#1f9e89", "#b5489c", "#8a8f3a", "#6f5bd6", "#c94f4f", "#4aa3c7",
  "#9a6b3f", "#5f9f4a", "#d16ba5", "#7f8896"];
const DASHES = ["solid", "dash", "dot", "dashdot"];

function hue(index) {
  return { color: HUES[index % HUES.length], dash: DASHES[Math.floor(index / HUES.length) % 4], width: 2.2 };
}

function axis(title, more) {
  return Object.assign({
    title: { text: title, standoff: 10, font: { size: 13 } },
    gridcolor: color("line"), zerolinecolor: color("line"), linecolor: color("line"),
    tickfont: { size: 12 }, automargin: true,
  }, more);
}

function draw(id, label, traces, layout) {
  const base = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: color("ink"), family: getComputedStyle(document.body).fontFamily, size: 13 },
    margin: { l: 56, r: 16, t: 12, b: 48 },
    hoverlabel: { bgcolor: color("card"), bordercolor: color("line"), font: { color: color("ink") } },
    legend: { orientation: "h", traceorder: "normal", y: -0.2, yanchor: "top", x: 0, font: { size: 12 } },
    dragmode: false,
  };
  if (printing) Object.assign(base, paperSize(byId(id)), { autosize: false });
  byId(id).setAttribute("aria-label", label);
  return Plotly.react(id, traces, Object.assign(base, layout),
    { displayModeBar: false, responsive: true, scrollZoom: false });
}

// The layout of paper is not known before it is printed: plots get sizes that fit A4 and Letter.
function paperSize(box) {
  const half = box.closest(".pair") !== null;
  return { width: half ? 335 : 685, height: half ? 290 : box.classList.contains("tall") ? 400 : 300 };
}

// Names that leave room for the picture on a narrow screen: the end of a path tells most.
function fitting(names) {
  const most = narrow() || printing ? 18 : 38;
  return names.map((name) => (name.length > most ? "…" + name.slice(1 - most) : name));
}

function heatScale() {
  return [[0, color("heat-0")], [0.5, color("heat-1")], [1, color("heat-2")]];
}

// A matrix with its numbers in the cells while there is room for them.
function heatmap(id, label, matrix, columns, rows, options) {
  const cells = columns.length * rows.length;
  const beside = 70 + 7 * Math.max(...rows.map((name) => fitting([name])[0].length));
  const width = printing ? paperSize(byId(id)).width : byId(id).clientWidth;
  const room = (width - beside) / columns.length > 30 && cells <= 400;
  const trace = {
    type: "heatmap", z: matrix, x: columns.map((_, i) => i), y: rows.map((_, i) => i),
    colorscale: options.scale || heatScale(), zmin: options.low || 0, zmax: options.high,
    text: matrix.map((row) => row.map((value) => (value === null ? "" : value.toFixed(2)))),
    hovertext: matrix.map((row, r) => row.map((value, c) => plain(options.hover(r, c, value)))),
    hoverinfo: "text", hoverongaps: false, xgap: 1, ygap: 1,
    colorbar: { thickness: 10, outlinewidth: 0, tickfont: { size: 11 }, len: 1 },
  };
  if (room) trace.texttemplate = "%{text}";
  const every = (names) => Math.max(1, Math.ceil(names.length / (narrow() || printing ? 12 : 24)));
  const ticks = (names) => {
    const kept = names.map((_, i) => i).filter((i) => i % every(names) === 0);
    return { tickvals: kept, ticktext: kept.map((i) => plain(fitting(names)[i])), showgrid: false, zeroline: false };
  };
  return draw(id, label, [trace], {
    xaxis: axis(options.x || "", Object.assign(ticks(columns), { tickangle: 0 })),
    yaxis: axis(options.y || "", Object.assign(ticks(rows), {
      autorange: "reversed",
    })),
    margin: { l: 20, r: 10, t: 12, b: 40 },
  });
}
