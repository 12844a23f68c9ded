// The page of a pipeline, after charts.js.
const CURVES = [
  ["accuracy", "Accuracy", { format: percent, min: 0, max: 1 }],
  ["language", "Language consistency", { format: percent, min: 0, max: 1 }],
  ["response_length", "Response length (tokens)", { min: 0 }],
  ["reflective_words", "Reflective words per response", { min: 0 }],
  ["aha", "“Aha” responses", { format: percent, min: 0 }],
];

function groupCharts(group, index) {
  const first = index === 0; // the paper's R1-Zero beside ours
  const row = make("div", { class: "charts four" });
  const notes = group.note ? [make("p", { class: "faint" }, group.note)] : [];
  document.getElementById("groups").append(make("h3", { class: "group" }, group.title), ...notes, row);
  const { metrics, stages } = group;
  const of = (name, more) => stages.map((stage, color) => ({ key: stage + "/" + name, label: stage, color, ...more }));
  const capped = limits(metrics.step, metrics[stages[0] + "/max_tokens"] || []);
  for (const [name, title, more] of CURVES) {
    chart(row, { title, metrics, series: of(name), ...more, ...(name === "response_length" ? capped : {}) });
  }
  chart(row, { title: "Reward, and held-out score", metrics, min: 0, series: [...of("reward"), ...of("eval/sampled", { label: "held-out", dashed: true })] });
  if (first) for (const curve of Object.values(run.paper)) published(row, curve);
}

function answerCell(answer) {
  const badge = make("span", { class: "badge " + (answer.correct ? "good" : "bad") }, answer.verdict);
  const length = answer.tokens === null ? "" : answer.tokens + " tokens";
  return make("div", {},
    make("h4", {}, answer.stage + " ", badge, " ", make("span", { class: "faint" }, length)), response(answer.response));
}

function questionRow(entry, index) {
  const marks = entry.answers.map((answer) => make("i", { class: answer.correct ? "good" : "bad", title: answer.stage + ": " + answer.verdict }));
  const row = make("details", {}, make("summary", { class: "plain" },
    make("span", { class: "question" }, entry.question), make("span", { class: "marks" }, ...marks),
    make("span", { class: "number" }, entry.suite)));
  const fill = () => { if (row.open && row.children.length === 1) row.append(make("div", { class: "abreast" }, ...entry.answers.map(answerCell))); };
  row.addEventListener("toggle", fill);
  if (index === 0) { row.open = true; fill(); }
  return row;
}

run.groups.forEach(groupCharts);
if (!run.groups.length) document.getElementById("groups").append(make("p", { class: "faint" }, "No stage of reinforcement learning has recorded a step."));
document.getElementById("answers").append(...run.answers.map(questionRow));
document.getElementById("answers-section").hidden = !run.answers.length;
if (!run.groups.length) for (const curve of Object.values(run.paper)) published(document.getElementById("paper-curves"), curve);
showCharts();
