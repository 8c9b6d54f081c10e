// What does not follow the slider: spectra, overlaps, similarity.
function drawSpectra(adapter) {
  const least = Math.min(...adapter.groups.flatMap((group) => [group.spectrum.left, group.spectrum.right]
    .map(({ value }) => value[value.length - 1] / (value[0] || 1) || 1)));
  for (const side of ["left", "right"]) {
    const traces = adapter.groups.map((group, g) => {
      const { index, value } = group.spectrum[side];
      return {
        name: plain(group.name), mode: "lines", line: hue(g), x: index, y: value.map((v) => v / (value[0] || 1)),
        hovertemplate: "direction %{x}: %{y:.3g}<extra>" + plain(group.name) + "</extra>",
      };
    });
    draw("spectrum-" + side, `Singular values of every group, ${side} factor.`, traces, {
      showlegend: false, xaxis: axis("direction"),
      yaxis: axis("relative to the largest", {
        type: "log", range: [Math.log10(Math.max(least, 1e-5)) - 0.1, 0.1],
        tickvals: [1, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0001, 0.00001],
      }),
    });
  }
  show("spectrum-legend", ...adapter.groups.map((group, g) => {
    const line = element("i");
    line.style.borderTop = `3px ${{ dash: "dashed", dot: "dotted", dashdot: "double" }[hue(g).dash] || "solid"} ${hue(g).color}`;
    return element("span", {}, line, group.name);
  }));
  onOpen("spectrum-table", () => spectrumTable(adapter));
}

function spectrumTable(adapter) {
  const needed = (spectrum, part) => {
    const total = spectrum.value.reduce((sum, v, i) => sum + v * v * gap(spectrum.index, i), 0);
    let held = 0;
    for (let i = 0; i < spectrum.value.length; i += 1) {
      held += spectrum.value[i] ** 2 * gap(spectrum.index, i);
      if (held >= part * total) return String(spectrum.index[i]);
    }
    return String(spectrum.index[spectrum.index.length - 1]);
  };
  const rows = adapter.groups.map((group) => [group.name,
    ...["left", "right"].flatMap((side) => [0.5, 0.75, 0.9, 0.99].map((part) => needed(group.spectrum[side], part)))]);
  const head = ["output", "input"].flatMap((side) => [50, 75, 90, 99].map((part) => `${side}, ${part} %`));
  return table("Directions that hold a share of a group’s energy", ["Group", ...head], rows);
}

// A long spectrum is thinned out: each value stands for those up to the next.
function gap(index, i) {
  return i ? index[i] - index[i - 1] : 1;
}

function offDiagonal(matrix) {
  return matrix.flatMap((row, r) => row.filter((value, c) => c !== r && value !== null));
}

// Long names stand beside their rows only; a column has its number.
function numbered(names) {
  const long = names.some((name) => name.length > 4);
  return {
    columns: long ? names.map((_, i) => String(i + 1)) : names,
    rows: long ? names.map((name, i) => `${fitting([name])[0]}  ${i + 1}`) : names,
  };
}

function drawOverlap(id, label, matrix, names, high, axisName, unnamed) {
  const shown = matrix.map((row, r) => row.map((value, c) => (r === c ? null : value)));
  const { columns, rows } = numbered(names);
  return heatmap(id, label, shown, columns, unnamed ? columns : rows, {
    high, x: axisName, y: axisName,
    hover: (r, c, value) => `${names[r]} and ${names[c]}: ${value === null ? "–" : value.toFixed(3)}`,
  });
}

function overlapTable(caption, matrix, names) {
  return table(caption, ["", ...names],
    matrix.map((row, r) => [names[r], ...row.map((value) => (value === null ? "–" : value.toFixed(3)))]));
}

function drawLayers(adapter, state) {
  const group = adapter.groups[state.group];
  const { left, right, chance } = group.overlap;
  const names = group.overlap.modules.map((k) => group.modules[k].layer || group.modules[k].name);
  const values = [...offDiagonal(left), ...offDiagonal(right)];
  const high = Math.max(0.1, ...values);
  byId("layers-chance").textContent = `Unrelated layers of this group would show about ${chance[0].toFixed(3)} (output) `
    + `and ${chance[1].toFixed(3)} (input); the strongest pair shows ${(values.length ? Math.max(...values) : 0).toFixed(2)}.`;
  drawOverlap("layers-left", `Overlap of output directions between layers of ${group.name}.`, left, names, high, "layer");
  drawOverlap("layers-right", `Overlap of input directions between layers of ${group.name}.`, right, names, high, "layer");
  onOpen("layers-table", () => [overlapTable(`${group.name}: output directions`, left, names),
    overlapTable(`${group.name}: input directions`, right, names)]);
}

function drawKinds(adapter) {
  const { left, right } = adapter.overlap;
  const names = adapter.overlap.groups.map((g) => adapter.groups[g].name);
  const high = Math.max(0.1, ...offDiagonal(left), ...offDiagonal(right));
  for (const side of ["left", "right"]) byId("kinds-" + side).style.height = Math.max(18, 6 + 2.6 * names.length) + "rem";
  drawOverlap("kinds-left", "Overlap of output directions between kinds of modules.", left, names, high, "");
  drawOverlap("kinds-right", "Overlap of input directions between kinds of modules.", right, names, high, "", !narrow());
  onOpen("kinds-table", () => [overlapTable("Output directions", left, names), overlapTable("Input directions", right, names)]);
}

function drawSimilarity(document_, state) {
  const alike = document_.similarity;
  if (!alike) return;
  const names = alike.adapters, matrix = state.kind < 0 ? alike.cosine : alike.kinds[state.kind].cosine;
  const { columns, rows } = numbered(names);
  heatmap("similarity", "Cosine between every two adapters.", matrix, columns, rows, {
    low: -1, high: 1,
    scale: [[0, color("lora")], [0.5, color("heat-0")], [1, color("accent")]],
    hover: (r, c, value) => `${names[r]} and ${names[c]}: ${value === null ? "no module in common" : value.toFixed(3)}`,
  });
  show("summary-table", table("What each compresses to", ["Adapter", "Size", "Recommended"], names.map((name, i) => {
    const adapter = document_.adapters[i], choice = adapter.recommended;
    return [name, size(adapter.source_bytes), choice ? {
      text: smaller(adapter.source_bytes, choice.bytes),
      note: `${choice.representation}, error ${error(choice.relative_error)}`,
    } : "nothing"];
  })));
  onOpen("similarity-table", () => table("Cosine of the updates", ["Adapter", ...names],
    matrix.map((row, i) => [names[i], ...row.map((value) => (value === null ? "–" : value.toFixed(3)))])));
}
