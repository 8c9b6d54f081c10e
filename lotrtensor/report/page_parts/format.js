// Numbers and names as people read them.
function size(bytes) {
  let value = bytes;
  for (const unit of ["B", "KiB", "MiB"]) {
    if (value < 1024) return (unit === "B" ? value.toFixed(0) : value.toFixed(1)) + " " + unit;
    value /= 1024;
  }
  return value.toFixed(2) + " GiB";
}

function count(value) {
  return value.toLocaleString("en-US");
}

function error(value) {
  if (value === null || value === undefined) return "–";
  return value !== 0 && value < 0.001 ? value.toExponential(1) : value.toFixed(3);
}

function share(value) {
  if (value === null || value === undefined) return "–";
  const percent = 100 * value;
  return (percent < 10 ? percent.toFixed(1) : percent.toFixed(0)) + " %";
}

// What an error keeps of the squared length; never "100 %" of what is not whole.
function kept(value) {
  const percent = 100 * (1 - value * value);
  return (value > 0 && percent > 99.5 ? percent.toFixed(percent > 99.95 ? 3 : 1) : percent.toFixed(0)) + " %";
}

function smaller(source, bytes) {
  const ratio = source / bytes;
  return ratio >= 1 ? ratio.toFixed(1) + " × smaller" : (1 / ratio).toFixed(1) + " × larger";
}

// Plotly reads a little HTML in its texts: names from files are shown as they are.
function plain(name) {
  return String(name).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
}

function quoted(name) {
  return /^[\w@%+=:,./-]+$/.test(name) ? name : "'" + name.replace(/'/g, "'\\''") + "'";
}

function layersOf(groups) {
  const labels = new Set(groups.flatMap((group) => group.modules.map((module) => module.layer)));
  return [...labels].sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
}
