// The page of one run, after charts.js.
const metrics = run.metrics;
const recorded = (name) => has(metrics, name);
const known = (prefix) => Object.keys(metrics).filter((name) => name.startsWith(prefix) && recorded(name));
const plot = (parent, spec) => chart(parent, { metrics, ...spec });

function allCharts() {
  const curves = document.getElementById("curves");
  const one = (title, key, more) => plot(curves, { title, series: [{ key, label: "", color: 0 }], ...more });
  plot(curves, {
    title: "Accuracy and format", hero: true, format: percent, min: 0, max: 1, level: run.chance, levelName: "chance",
    series: [
      { key: "accuracy", label: "accuracy", color: 0 }, { key: recorded("format") ? "format" : "reasoning_format", label: "format", color: 1 },
      { key: "eval/sampled", label: "held-out, sampled", color: 2 },
      { key: "eval/greedy", label: "held-out, greedy", color: 4, dashed: true },
    ],
  });
  plot(curves, {
    title: "Reward and held-out score", series: [{ key: "reward", label: "reward", color: 0 },
      ...["helpful", "safety", "judge"].map((key, index) => ({ key, label: key, color: 5 + index })),
      { key: "eval/sampled", label: "held-out", color: 2 }],
  });
  const capped = { min: 0, ...limits(metrics.step || [], metrics.max_tokens || []) };
  one("Response length (tokens)", "response_length", capped);
  one("Reflective words", "reflective_words", { min: 0, note: "the paper's ten words, per response" });
  one("“Aha” responses", "aha", { format: percent, min: 0, note: "share that turns back on itself" });
  one("Language mixing", "language_mixing", { format: percent, min: 0, note: "words of the reasoning that are not in the question's language" });
  one("Language consistency", "language", { format: percent, min: 0, max: 1, note: "as the reward counts it: no words, no consistency" });
  one("Value loss", "value_loss", { min: 0 });
  one("Explained variance", "explained_variance", { max: 1, note: "of the returns, by the critic's values before the update" });
  one("Returns", "returns", { note: "mean per token" });
  one("Truncated outputs", "truncated", { format: percent, min: 0 });
  one("Groups without signal", "zero_std_groups", { format: percent, min: 0, note: "all rewards of the group equal: advantage 0" });
  one("KL to the reference", "kl", { min: 0, note: "k3 estimate, nats per token" });
  one("Entropy", "entropy", { note: "nats per token" });
  one("Clip fraction", "clip_fraction", { format: percent, min: 0 });
  one("Gradient norm", "grad_norm", { min: 0 });
  one("Loss", "loss");
  one("Negative log-likelihood", "nll", { note: "nats per token" });
  plot(curves, { title: "Learning rate", min: 0, series: [{ key: "lr", label: "", exact: true }] });
  plot(curves, {
    title: "Engine against trainer", min: 0, note: "|log-prob difference| per sampled token, nats",
    series: [{ key: "logprob_mismatch_mean", label: "mean", color: 0 }, { key: "logprob_mismatch_max", label: "max", color: 3 }],
  });
  one("KL from the engine's policy", "rollout_kl", { note: "k3 estimate, nats per token" });
  one("Largest |ratio - 1|", "ratio_deviation_max", { min: 0 });

  const paper = document.getElementById("paper");
  if (run.paper.accuracy && recorded("accuracy")) {
    plot(paper, { title: "This run: accuracy", format: percent, min: 0, max: 1,
      series: [{ key: "accuracy", label: "in training", color: 0 }, { key: "eval/sampled", label: "held-out", color: 2 }] });
    published(paper, run.paper.accuracy);
    plot(paper, { title: "This run: response length (tokens)", series: [{ key: "response_length", label: "", color: 0 }], ...capped });
    published(paper, run.paper.response_length);
  }
  document.getElementById("paper-section").hidden = !paper.children.length;

  const times = document.getElementById("times");
  const phases = ["generate", "pack", "reference", "score", "train", "sync", "checkpoint"].map((name) => "time/" + name).filter(recorded);
  const others = known("time/").filter((name) => name !== "time/step" && !phases.includes(name));
  plot(times, {
    title: "Seconds per step, by phase", hero: true, stacked: true, format: seconds, min: 0,
    series: phases.concat(others).map((key) => ({ key, label: key.slice(5) })),
  });
  plot(times, { title: "Tokens per second", min: 0, series: [{ key: "tokens_per_second", label: "", color: 2 }] });
  plot(times, { title: "Samples per second", min: 0, series: [{ key: "samples_per_second", label: "", color: 2 }] });
  plot(times, { title: "Peak memory (GiB)", min: 0, series: [{ key: "peak_memory_gib", label: "", color: 4 }] });

  const words = document.getElementById("words");
  plot(words, {
    title: "Reflective words per response", hero: true, min: 0,
    series: known("words/").map((key) => ({ key, label: key.slice(6) })),
  });
  plot(words, { title: "Verdicts", hero: true, min: 0, series: known("verdict/").map((key) => ({ key, label: key.slice(8) })) });
  document.getElementById("words-section").hidden = !words.children.length;
}

// ---- samples ----

const PAGE_SIZE = 25;
let shown = PAGE_SIZE;
const verdict = (sample) => sample.verdicts.accuracy || (sample.terms.accuracy > 0 ? "equal" : "unequal");
const tone = (word) => (["equal", "ok", "correct"].includes(word) ? "good" : ["unequal", "incorrect"].includes(word) ? "bad" : "odd");

function chosen() {
  const step = document.getElementById("filter-step").value;
  const word = document.getElementById("filter-verdict").value;
  const text = document.getElementById("filter-text").value.toLowerCase();
  const aha = document.getElementById("filter-aha").checked;
  return run.samples.filter((sample) =>
    (!step || String(sample.step) === step) && (!aha || sample.aha) &&
    (!word || (word === "not equal" ? verdict(sample) !== "equal" : verdict(sample) === word)) &&
    (!text || (sample.question + "\n" + sample.response + "\n" + sample.prompt_id).toLowerCase().includes(text)));
}

function table(pairs) {
  return make("table", {}, make("tbody", {}, ...pairs.map(([name, value]) =>
    make("tr", {}, make("th", {}, name), make("td", {}, String(value))))));
}

function sampleBody(sample) {
  const left = make("div", {},
    make("h4", {}, "Question"), make("pre", {}, sample.question),
    make("h4", {}, "Response"), response(sample.response));
  const right = make("div", {},
    make("h4", {}, "Reference answer"), make("pre", {}, sample.answer),
    make("h4", {}, "Reward"), table([["total", number(sample.reward)], ...Object.entries(sample.terms).map(([name, value]) => [name, number(value)])]),
    make("h4", {}, "Verdicts"), table(Object.entries(sample.verdicts)),
    make("h4", {}, "Output"), table([["prompt", sample.prompt_id], ["index in its group", sample.index], ["tokens", sample.response_length],
      ["finished by", sample.finish_reason], ["weights", "version " + sample.weight_version]]));
  return make("div", { class: "sample-body" }, left, right);
}

function sampleRow(sample) {
  const format = sample.verdicts.format;
  const row = make("details", {}, make("summary", {},
    make("span", { class: "step faint" }, "step " + sample.step),
    make("span", { class: "question" }, sample.question),
    make("span", { class: "badge second " + tone(format) }, format ? "format " + format : ""),
    make("span", { class: "badge " + tone(verdict(sample)) }, verdict(sample)),
    make("span", { class: "number" }, sample.response_length + " tokens"),
    make("span", { class: "number" }, "r = " + number(sample.reward))));
  if (!format) row.querySelector(".second").hidden = true;
  row.addEventListener("toggle", () => { if (row.open && row.children.length === 1) row.append(sampleBody(sample)); });
  return row;
}

function listSamples() {
  const found = chosen();
  const list = document.getElementById("samples");
  list.replaceChildren(...found.slice(0, shown).map(sampleRow));
  if (!found.length) list.append(make("p", { class: "empty" }, "No sample matches."));
  document.getElementById("more").hidden = found.length <= shown;
  document.getElementById("sample-count").textContent =
    `${found.length} of ${run.samples.length} shown` + (run.num_samples > run.samples.length ? `, ${run.num_samples} recorded` : "");
}

function samplesSection() {
  if (!run.samples.length) { document.getElementById("samples-section").hidden = true; return; }
  run.samples.reverse(); // newest first
  const add = (id, values) => values.forEach((value) => document.getElementById(id).append(make("option", { value }, String(value))));
  add("filter-step", [...new Set(run.samples.map((sample) => sample.step))]);
  add("filter-verdict", [...new Set(run.samples.map(verdict))].sort().concat("not equal"));
  for (const id of ["filter-step", "filter-verdict", "filter-aha", "filter-text"]) {
    document.getElementById(id).addEventListener("input", () => { shown = PAGE_SIZE; listSamples(); });
  }
  document.getElementById("more").addEventListener("click", () => { shown += PAGE_SIZE; listSamples(); });
  listSamples();
}

allCharts();
showCharts();
samplesSection();
