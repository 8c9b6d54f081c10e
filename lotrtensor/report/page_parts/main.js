// The page itself: what is chosen, and who redraws when.
const report = JSON.parse(byId("analysis").textContent);
const state = { adapter: 0, step: 0, mode: "compressed", group: 0, kind: -1 };

function current() {
  return report.adapters[state.adapter];
}

function drawHead(adapter) {
  const modules = adapter.groups.flatMap((group) => group.modules);
  const ranks = [...new Set(modules.map((module) => module.lora_rank))].sort((a, b) => a - b);
  const span = ranks.length > 1 ? `${ranks[0]} to ${ranks[ranks.length - 1]}` : ranks[0];
  const layers = layersOf(adapter.groups).filter((layer) => layer !== "");
  byId("title").textContent = adapter.name;
  const facts = [`${modules.length} modules in ${layers.length || 1} ${layers.length > 1 ? "layers" : "layer"}`,
    `LoRA rank ${span}`, `${count(adapter.source_parameters)} parameters`,
    `${size(adapter.source_bytes)} in ${adapter.dtype}`];
  if (adapter.base_model) facts.push(`base model ${adapter.base_model}`);
  if (adapter.type !== "LORA") facts.push(`stored as a ${adapter.type === "LOTR" ? "LoTR" : "compressed adapter"} of ${size(adapter.stored_bytes)}, compared as the LoRA that it exports to`);
  byId("facts").textContent = facts.join(" · ");
}

// The larger the error, the less the norm alone can promise.
function verdict(adapter, choice) {
  if (!choice) return "Do not compress it by its norm alone.";
  if (FAMILIES[choice.kind] === "bits") return `Yes, compress it: ${smaller(adapter.source_bytes, choice.bytes)}.`;
  const [form, ranks] = choice.representation.split(", ");
  return `Yes, make it ${smaller(adapter.source_bytes, choice.bytes)} with ${form}${ranks ? ` (${ranks})` : ""}.`;
}

function drawHero(adapter) {
  const choice = adapter.recommended;
  byId("verdict").textContent = verdict(adapter, choice);
  const text = adapter.recommendation;
  byId("recommendation").textContent = text.charAt(0).toUpperCase() + text.slice(1) + ".";
  show("commands", ...(choice ? commandsFor(adapter, choice) : []));
}

function commandsFor(adapter, choice) {
  const at = adapter.choices.filter((other) => other.budget === choice.budget && !other.measured);
  at.sort((a, b) => a.relative_error - b.relative_error);
  const other = at.find((one) => COMMANDS[one.kind].verb !== COMMANDS[choice.kind].verb);
  return [choice, other].filter(Boolean).map((one) => element("div", { class: "command" },
    element("span", {}, one.representation), element("code", {}, command(adapter, one))));
}

// What makes each kind of choice, beside its size.
const COMMANDS = {
  compressed: { verb: "compress", more: "" },
  "terms-in-bits": { verb: "compress", more: " --form lora" },
  "shared-in-bits": { verb: "compress", more: " --form lotr" },
  "lotr-by-type": { verb: "convert", more: "" },
  "lotr-by-shape": { verb: "convert", more: " --group-by shape" },
  "lotr-clustered": { verb: "convert", more: " --cluster 2" },
  "lora-best-ranks": { verb: "truncate", more: "" },
  "lora-one-rank": { verb: "truncate", more: "" },
};

function command(adapter, choice) {
  const from = quoted(adapter.name), { verb, more } = COMMANDS[choice.kind];
  if (choice.kind === "lora-one-rank") {
    const modules = adapter.groups.flatMap((group) => group.modules.map(() => group.shape[0] + group.shape[1]));
    const rank = Math.max(1, Math.round(choice.parameters / modules.reduce((a, b) => a + b, 0)));
    return `lotr truncate ${from} -o smaller --rank ${rank}`;
  }
  // A form in bits is asked for by the size that it was allowed, as it was made.
  const budget = choice.parameters === null ? Math.floor(choice.budget * adapter.source_bytes) : choice.bytes;
  return `lotr ${verb} ${from} -o smaller --budget ${budget}${more}`;
}

function drawTargets(adapter) {
  const tolerances = [...new Set(adapter.targets.map((target) => target.tolerance))];
  const names = [...new Set(adapter.targets.map((target) => target.representation))];
  const best = tolerances.map((tolerance) => Math.min(...adapter.targets
    .filter((target) => target.tolerance === tolerance && target.bytes !== null).map((target) => target.bytes)));
  const rows = names.map((name) => [name, ...tolerances.map((tolerance, i) => {
    const found = adapter.targets.find((target) => target.representation === name && target.tolerance === tolerance);
    if (found.bytes === null) return "–";
    return { text: smaller(adapter.source_bytes, found.bytes), note: size(found.bytes), best: found.bytes === best[i] };
  })]);
  show("targets", table("Smallest size by way to store it and by what is kept", ["Way to store it",
    ...tolerances.map((tolerance) => `keeps ${kept(tolerance)} (error ${tolerance})`)], rows, { hidden: true }));
}

function drawFixed() {
  const adapter = current();
  drawHead(adapter);
  drawHero(adapter);
  drawTargets(adapter);
  drawSpectra(adapter);
  drawLayers(adapter, state);
  drawKinds(adapter);
  drawSimilarity(report, state);
}

function drawChosen() {
  const adapter = current();
  drawNumbers(adapter, state);
  drawRate(adapter, state);
  drawGroups(adapter, state);
  drawHeat(adapter, state);
  drawEnergy(adapter, state);
}

function drawAll() {
  drawFixed();
  drawChosen();
}

// The largest size within the recommended one, or the middle one.
function firstStep(adapter) {
  const choice = adapter.recommended;
  if (!choice) return Math.floor((adapter.steps.length - 1) / 2);
  const within = adapter.steps.filter((step) => step.bytes <= choice.budget * adapter.source_bytes).length;
  return Math.max(0, within - 1);
}

function choose(index) {
  const adapter = report.adapters[index], slider = byId("size");
  Object.assign(state, { adapter: index, step: firstStep(adapter), group: 0 });
  slider.max = adapter.steps.length - 1;
  slider.value = state.step;
  byId("group").replaceChildren(...adapter.groups.map((group, g) => element("option", { value: g }, group.name)));
  drawAll();
}

function listen() {
  let waiting = false;
  byId("size").addEventListener("input", (event) => {
    state.step = Number(event.target.value);
    drawNumbers(current(), state);
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; drawChosen(); });
  });
  for (const radio of document.querySelectorAll('input[name="mode"]')) {
    radio.addEventListener("change", () => { state.mode = radio.value; drawChosen(); });
  }
  byId("group").addEventListener("change", (event) => { state.group = Number(event.target.value); drawLayers(current(), state); });
  byId("kind").addEventListener("change", (event) => { state.kind = Number(event.target.value); drawSimilarity(report, state); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  // Paper has another width and other colours: plots are drawn anew for it, tables filled.
  const print = (on) => {
    printing = on;
    document.documentElement.toggleAttribute("data-printing", on);
    drawAll();
  };
  addEventListener("beforeprint", () => print(true));
  addEventListener("afterprint", () => print(false));
}

function offerAdapters() {
  const box = byId("adapters");
  box.hidden = report.adapters.length < 2;
  report.adapters.forEach((adapter, i) => {
    const radio = element("input", { type: "radio", name: "adapter", value: i });
    radio.checked = i === 0;
    radio.addEventListener("change", () => choose(i));
    box.append(element("label", {}, radio, " ", adapter.name));
  });
  byId("alike").hidden = !report.similarity;
  byId("kind").replaceChildren(element("option", { value: -1 }, "all together"),
    ...(report.similarity ? report.similarity.kinds : []).map((kind, i) => element("option", { value: i }, kind.name)));
  byId("json-command").textContent = `lotr analyze ${report.adapters.map((adapter) => quoted(adapter.name)).join(" ")} --json`;
}

// Plotly travels compressed; the page's policy lets exactly this script run.
async function loadPlotly() {
  const packed = Uint8Array.from(atob(byId("plotly").textContent), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = element("script", {}, await new Response(stream).text());
  document.head.append(script);
}

async function start() {
  try {
    await loadPlotly();
    offerAdapters();
    listen();
    choose(0);
    document.documentElement.dataset.ready = "true";
  } catch (problem) {
    byId("failure").hidden = false;
    byId("failure").textContent = `This page could not be drawn: ${problem.message}. A browser of 2023 or newer is needed.`;
    throw problem;
  }
}

start();
