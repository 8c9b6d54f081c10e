// Everything that follows the slider: size, error, groups, modules, layers.
// What the adapter in bits, or LoTR, makes of the chosen size; the other where it needs more bytes.
function point(adapter, state) {
  const step = adapter.steps[state.step];
  return step[state.mode] || step.compressed || step.lotr;
}

function inBits(adapter, state) {
  const step = adapter.steps[state.step];
  return point(adapter, state) === step.compressed;
}

// Kinds of form that the chosen one is compared with: those of another family.
const FAMILIES = {
  compressed: "bits", "terms-in-bits": "bits", "shared-in-bits": "bits",
  "lotr-by-type": "lotr", "lotr-by-shape": "lotr", "lotr-clustered": "lotr",
  "lora-best-ranks": "lora", "lora-one-rank": "lora",
};

function nameOf(adapter, kind) {
  return adapter.curves.find((curve) => curve.kind === kind).representation;
}

function bestOf(step, families) {
  const reached = Object.entries(step.alternatives).filter(([kind]) => families.includes(FAMILIES[kind]));
  reached.sort((a, b) => a[1] - b[1]);
  return reached.length ? { kind: reached[0][0], error: reached[0][1] } : null;
}

function chosenName(adapter, state) {
  return inBits(adapter, state) ? "compressed" : "LoTR by type, ranks shared out";
}

function drawNumbers(adapter, state) {
  const step = adapter.steps[state.step], now = point(adapter, state);
  const other = bestOf(step, inBits(adapter, state) ? ["lotr", "lora"] : ["bits", "lora"]);
  byId("size-value").textContent = size(step.bytes);
  byId("size").setAttribute("aria-valuetext", `${size(step.bytes)}, error ${error(now.relative_error)}`);
  byId("n-bytes").textContent = size(now.bytes);
  byId("n-ratio").textContent = smaller(adapter.source_bytes, now.bytes);
  byId("n-error").textContent = error(now.relative_error);
  byId("n-kept").textContent = "keeps " + kept(now.relative_error) + " of the energy";
  byId("n-bound").textContent = error(now.lower_bound);
  byId("n-other").textContent = other ? error(other.error) : "–";
  byId("n-other-name").textContent = other ? nameOf(adapter, other.kind) : "none gets this small";
  byId("n-other-box").className = other && other.error < now.relative_error ? "better" : "";
  byId("sentence").replaceChildren(...sentence(adapter, state, step, now));
}

function sentence(adapter, state, step, now) {
  const lora = bestOf(step, ["lora"]), verb = inBits(adapter, state) ? "compress" : "convert";
  const command = `lotr ${verb} ${quoted(adapter.name)} -o smaller --budget ${now.bytes}`;
  const against = lora
    ? `truncated LoRA reaches ${error(lora.error)} at that size. `
    : "truncated LoRA does not get that small. ";
  return [`${chosenName(adapter, state)}: ${smaller(adapter.source_bytes, now.bytes)}, `
    + `error ${error(now.relative_error)}; ${against}`, element("code", {}, command)];
}

function percentOf(adapter, bytes) {
  return bytes.map((value) => 100 * value / adapter.source_bytes);
}

function rateTraces(adapter, state) {
  const traces = [], byType = adapter.curves.find((curve) => curve.kind === "lotr-by-type");
  const x = percentOf(adapter, byType.bytes);
  const quiet = { mode: "lines", line: { width: 0 }, hoverinfo: "skip", showlegend: false };
  traces.push(Object.assign({ x, y: byType.lower_bound }, quiet));
  traces.push(Object.assign({ x, y: byType.relative_error, fill: "tonexty", fillcolor: faint("accent") }, quiet));
  for (const curve of adapter.curves) {
    const style = STYLES[curve.kind] || hue(5);
    traces.push({
      name: curve.representation, mode: "lines", x: percentOf(adapter, curve.bytes), y: curve.relative_error,
      line: { color: color(style.color), dash: style.dash, width: style.width },
      hovertemplate: "%{x:.3g} % of the bytes: error %{y:.3f}<extra>" + curve.representation + "</extra>",
    });
  }
  const now = point(adapter, state);
  traces.push({
    name: "chosen size", mode: "markers", x: percentOf(adapter, [now.bytes]), y: [now.relative_error],
    marker: { size: 17, color: color("accent"), line: { color: color("card"), width: 3 } },
    hovertemplate: "chosen: %{x:.3g} %, error %{y:.3f}<extra></extra>",
  });
  const measured = adapter.choices.filter((choice) => choice.measured);
  traces.push({
    name: "really made", mode: "markers", text: measured.map((choice) => choice.representation), x: percentOf(adapter, measured.map((choice) => choice.bytes)),
    y: measured.map((choice) => choice.relative_error),
    marker: { symbol: "star", size: 14, color: color("ink"), line: { color: color("card"), width: 1.5 } },
    hovertemplate: "%{text}, made: %{x:.3g} %, error %{y:.4f}<extra></extra>",
  });
  return traces;
}

function faint(name) {
  const hex = color(name);
  return hex + "2e";
}

function drawRate(adapter, state) {
  const now = point(adapter, state), x = 100 * now.bytes / adapter.source_bytes;
  const line = { type: "line", line: { color: color("quiet"), width: 1, dash: "dot" }, layer: "below" };
  const levels = [0.1, 0.3, 0.5];
  const low = Math.min(...adapter.curves.map((curve) => curve.bytes[0])) / adapter.source_bytes;
  const range = [Math.log10(Math.max(0.05, 90 * low)), Math.log10(112)];
  const label = `Size against error. Chosen: ${x.toFixed(1)} percent of the bytes at error ${error(now.relative_error)}.`;
  draw("rate", label, rateTraces(adapter, state), {
    xaxis: axis("size, percent of the adapter’s bytes", {
      type: "log", range, tickvals: [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100], ticksuffix: " %",
    }),
    yaxis: axis("error", { range: [0, 1.02], tickvals: [0, 0.2, 0.4, 0.6, 0.8, 1] }),
    shapes: [Object.assign({ xref: "x", yref: "paper", x0: x, x1: x, y0: 0, y1: 1 }, line),
      ...levels.map((y) => Object.assign({ xref: "paper", x0: 0, x1: 1, y0: y, y1: y }, line))],
    annotations: levels.map((y) => ({
      xref: "paper", x: 0, xanchor: "left", y, yanchor: "bottom", showarrow: false,
      text: `keeps ${kept(y)}`, font: { size: 11, color: color("soft") },
    })),
    legend: { orientation: "h", traceorder: "normal", y: narrow() ? -0.22 : -0.16, yanchor: "top", x: 0, font: { size: 12 } },
  });
  onOpen("rate-table", () => choiceTable(adapter));
}

function choiceTable(adapter) {
  const names = [...new Set(adapter.choices.map((choice) => choice.representation))];
  const budgets = [...new Set(adapter.choices.map((choice) => choice.budget))];
  const rows = budgets.map((budget) => {
    const at = adapter.choices.filter((choice) => choice.budget === budget && !choice.measured);
    const best = Math.min(...at.map((choice) => choice.relative_error));
    const cells = names.map((name) => {
      const found = at.find((choice) => choice.representation === name);
      if (!found) return "–";
      const made = adapter.choices.find((choice) => choice.measured && choice.budget === budget && choice.representation === name);
      const notes = [made ? "made " + error(made.relative_error) : "",
        found.lower_bound === null ? "" : "bound " + error(found.lower_bound)];
      return { text: error(found.relative_error), note: notes.filter(Boolean).join(", "), best: found.relative_error === best };
    });
    return [share(budget), size(budget * adapter.source_bytes), ...cells];
  });
  return table("Error at a size, as predicted, and at the recommended size as made",
    ["Bytes at most", "", ...names], rows);
}

function drawGroups(adapter, state) {
  const now = point(adapter, state), bits = inBits(adapter, state);
  const rows = adapter.groups.map((group, g) => {
    const at = now.groups[g], whole = sourceBytes(adapter, group);
    return [group.name, `${group.modules.length} of ${group.shape.join(" × ")}`,
      at.p ? `${at.p}, ${at.q}` : "–", bits ? count(at.terms) : "–", size(at.bytes), share(at.bytes / whole),
      withMeter(error(at.relative_error), at.relative_error), error(at.lower_bound)];
  });
  const modules = adapter.groups.reduce((sum, group) => sum + group.modules.length, 0);
  rows.push(["all", String(modules), "", "", size(now.bytes), share(now.bytes / adapter.source_bytes),
    withMeter(error(now.relative_error), now.relative_error), error(now.lower_bound)]);
  show("groups-table", table(`${chosenName(adapter, state)}: every group`,
    ["Group", "Modules", "Shared p, q", "Terms", "Bytes", "Of LoRA", "Error", "Lower bound"],
    rows, { total: true }));
  const traces = adapter.groups.map((group, g) => ({
    name: plain(group.name), mode: "lines", line: hue(g), legendgroup: String(g),
    x: group.rates.parameters.map((value) => 100 * value / group.parameters), y: group.rates.relative_error,
    customdata: group.rates.p.map((p, i) => [p, group.rates.q[i]]),
    hovertemplate: "ranks %{customdata[0]}, %{customdata[1]}: %{x:.3g} %, error %{y:.3f}<extra>" + plain(group.name) + "</extra>",
  }));
  adapter.groups.forEach((group, g) => traces.push({
    name: plain(group.name), mode: "markers", showlegend: false, legendgroup: String(g), hoverinfo: "skip",
    x: [100 * now.groups[g].bytes / sourceBytes(adapter, group)], y: [now.groups[g].relative_error],
    marker: { size: 11, color: hue(g).color, line: { color: color("card"), width: 2 } },
  }));
  draw("groups", "Size against error of every group, with the chosen ranks marked.", traces, {
    xaxis: axis("size, percent of the group’s LoRA", { type: "log", tickvals: [0.2, 0.5, 1, 2, 5, 10, 20, 50, 100], ticksuffix: " %", range: groupRange(adapter) }),
    yaxis: axis("error of the group", { range: [0, 1.02] }),
  });
  onOpen("rates-table", () => ratesTable(adapter));
}

function sourceBytes(adapter, group) {
  return adapter.source_bytes * group.parameters / adapter.source_parameters;
}

function groupRange(adapter) {
  const low = Math.min(...adapter.groups.map((group) => group.rates.parameters[0] / group.parameters));
  return [Math.log10(Math.max(0.05, 90 * low)), Math.log10(130)];
}

function ratesTable(adapter) {
  return adapter.groups.map((group) => {
    const { p, q, parameters, bytes, relative_error, lower_bound } = group.rates;
    const rows = p.map((_, i) => [`${p[i]}, ${q[i]}`, count(parameters[i]), size(bytes[i]),
      error(relative_error[i]), error(lower_bound[i])]);
    return table(group.name, ["Ranks p, q", "Parameters", "Bytes", "Error", "Lower bound"], rows);
  });
}

// Errors or energies by group and layer; null where a group has no such layer.
function byLayer(adapter, values) {
  const layers = layersOf(adapter.groups), index = new Map(layers.map((layer, i) => [layer, i]));
  const rows = adapter.groups.map((group, g) => {
    const row = layers.map(() => null);
    group.modules.forEach((module, k) => { row[index.get(module.layer)] = values(g, k); });
    return row;
  });
  return { layers, rows };
}

function drawHeat(adapter, state) {
  const now = point(adapter, state);
  const { layers, rows } = byLayer(adapter, (g, k) => now.groups[g].module_errors[k]);
  const names = adapter.groups.map((group) => group.name);
  byId("heat").style.height = Math.max(13, 6 + 2.6 * names.length) + "rem";
  heatmap("heat", "Error of every module by layer and kind, at the chosen size.", rows, layers, names, {
    high: 1, x: "layer", hover: (r, c, value) => `${names[r]}, layer ${layers[c]}: error ${error(value)}`,
  });
  onOpen("heat-table", () => table("Error by group and layer at the chosen size", ["Group", ...layers],
    rows.map((row, g) => [names[g], ...row.map(error)])));
}

function drawEnergy(adapter, state) {
  const now = point(adapter, state), groups = adapter.groups;
  const total = groups.reduce((sum, group) => sum + group.norm ** 2, 0) || 1;
  const energy = byLayer(adapter, (g, k) => groups[g].modules[k].norm ** 2 / total);
  const lost = byLayer(adapter, (g, k) =>
    groups[g].modules[k].norm ** 2 * now.groups[g].module_errors[k] ** 2 / total).rows;
  const sums = (rows) => energy.layers.map((_, i) => rows.reduce((sum, row) => sum + (row[i] || 0), 0));
  const whole = sums(energy.rows), away = sums(lost);
  const x = energy.layers.map(plain), stay = whole.map((value, i) => 100 * (value - away[i]));
  const bar = (name, y, marker) => ({
    type: "bar", name, x, y, marker, hovertemplate: "layer %{x}: %{y:.3g} % of the energy<extra>" + name + "</extra>",
  });
  draw("energy", "Share of the energy that each layer holds, kept and lost at the chosen size.", [
    bar("kept", stay, { color: color("accent") }),
    bar("lost", away.map((value) => 100 * value), {
      color: color("card"), line: { color: color("accent"), width: 1 },
      pattern: { shape: "/", fgcolor: color("accent"), bgcolor: color("card"), size: 6 },
    }),
  ], {
    barmode: "stack", bargap: 0.25,
    xaxis: axis("layer", { type: "category", gridcolor: "rgba(0,0,0,0)" }),
    yaxis: axis("share of the energy", { ticksuffix: " %" }),
  });
  onOpen("energy-table", () => table("Share of the energy by layer and group, and what is kept",
    ["Layer", ...groups.map((group) => group.name), "Layer", "Kept"],
    energy.layers.map((layer, i) => [layer, ...energy.rows.map((row) => share(row[i])), share(whole[i]),
      share(whole[i] ? 1 - away[i] / whole[i] : null)])));
}
