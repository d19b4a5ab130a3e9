"use strict";
// Shows the rows of report.html, a page of them at a time. Text reaches the document as text nodes only.
const PAGE = 50;
const MOST_CELLS = 4e6; // of a diff's table, a tenth of a second; longer texts are shown without one
const LEAST_COMMON = 0.3; // of the longer text; below it a diff is confetti
const rows = JSON.parse(document.getElementById("data").textContent);
const names = [...document.querySelectorAll("#who option")].map((option) => option.text);
const control = (id) => document.getElementById(id);
let chosen = [];
let shown = 0;

function element(kind, text, className) {
  const node = document.createElement(kind);
  if (text !== undefined) node.textContent = text;
  if (className) node.className = className;
  return node;
}

// A word of letters or digits is one piece; any other character, such as a Chinese one, is a piece of its own.
const pieces = (text) => text.match(/[\p{Script=Latin}\p{Nd}]+|[^]/gu) || [];

// Returns [kind, text] of runs: "same", "extra" (only in the answer) and "missing" (only in the target).
function diff(target, answer) {
  const a = pieces(target), b = pieces(answer);
  let start = 0;
  while (start < a.length && start < b.length && a[start] === b[start]) start++;
  let end = 0;
  while (end < a.length - start && end < b.length - start && a[a.length - 1 - end] === b[b.length - 1 - end]) end++;
  const left = a.slice(start, a.length - end), right = b.slice(start, b.length - end);
  const width = right.length + 1;
  if ((left.length + 1) * width > MOST_CELLS) return [["same", answer]];
  const common = new Uint32Array((left.length + 1) * width); // longest common subsequence of the remainders
  for (let i = left.length - 1; i >= 0; i--)
    for (let j = right.length - 1; j >= 0; j--)
      common[i * width + j] = left[i] === right[j]
        ? common[(i + 1) * width + j + 1] + 1
        : Math.max(common[(i + 1) * width + j], common[i * width + j + 1]);
  if (start + end + common[0] < LEAST_COMMON * Math.max(a.length, b.length)) return [["extra", answer]];
  const runs = [];
  const add = (kind, text) => {
    if (!text) return;
    if (runs.length && runs[runs.length - 1][0] === kind) runs[runs.length - 1][1] += text;
    else runs.push([kind, text]);
  };
  add("same", a.slice(0, start).join(""));
  let i = 0, j = 0;
  while (i < left.length || j < right.length) {
    if (i < left.length && j < right.length && left[i] === right[j]) { add("same", left[i++]); j++; }
    else if (j >= right.length || (i < left.length && common[(i + 1) * width + j] >= common[i * width + j + 1])) add("missing", left[i++]);
    else add("extra", right[j++]);
  }
  add("same", a.slice(a.length - end).join(""));
  return runs;
}

function cell(title, details, runs) {
  const box = element("div"), head = element("h3", title), text = element("div", undefined, "text");
  head.append(element("span", details));
  for (const [kind, run] of runs) text.append(kind === "same" ? run : element(kind === "extra" ? "mark" : "del", run));
  box.append(head, text);
  return box;
}

function card(number) {
  const [prompt, target, answers] = rows[number];
  const article = element("article", undefined, "card row"), grid = element("div", undefined, "answers");
  const head = element("header");
  head.append(element("span", `row ${number + 1}`));
  grid.append(cell("target", `  ${[...target].length} characters`, [["same", target]]));
  answers.forEach(([answer, score, isTarget, tokens], index) => {
    const verdict = isTarget ? "  as the target" : `  ROUGE-L ${score}, ${tokens} tokens`;
    const box = cell(names[index], verdict, isTarget ? [["same", answer]] : diff(target, answer));
    if (isTarget) box.className = "right";
    grid.append(box);
  });
  article.append(head, element("div", prompt, "text"), grid);
  return article;
}

function showMore() {
  const fragment = document.createDocumentFragment();
  for (const number of chosen.slice(shown, shown + PAGE)) fragment.append(card(number));
  control("rows").append(fragment);
  shown = Math.min(shown + PAGE, chosen.length);
  control("more").hidden = shown === chosen.length;
  control("more").textContent = `show more (${chosen.length - shown} left)`;
}

function choose() {
  const text = control("filter").value.toLowerCase(), who = Number(control("who").value);
  const which = control("which").value, answer = (number) => rows[number][2][who];
  chosen = [...rows.keys()].filter((number) => {
    const [prompt, target, answers] = rows[number];
    if (which === "wrong" && answer(number)[2]) return false;
    if (which === "different" && answers.every((each) => each[0] === answers[0][0])) return false;
    return !text || [prompt, target, ...answers.map((each) => each[0])].some((each) => each.toLowerCase().includes(text));
  });
  const keys = {
    low: (number) => answer(number)[1], high: (number) => -answer(number)[1],
    long: (number) => -answer(number)[0].length, short: (number) => answer(number)[0].length,
  };
  const key = keys[control("order").value];
  if (key) chosen.sort((a, b) => key(a) - key(b) || a - b);
  control("rows").replaceChildren();
  control("count").textContent = `${chosen.length} of ${rows.length} rows`;
  shown = 0;
  showMore();
}

if (names.length < 2) {
  control("who-label").hidden = true;
  control("which").querySelector("[value=different]").remove();
}
for (const id of ["filter", "who", "which", "order"]) control(id).addEventListener("input", choose);
control("more").addEventListener("click", showMore);
choose();
