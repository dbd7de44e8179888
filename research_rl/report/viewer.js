"use strict";
const groups = JSON.parse(document.getElementById("trajectories").textContent);
const PAGE = 20;
const BLOCK = /(<\/?(?:think|search|answer|result)>)/;
let shown = PAGE;

function element(tag, kind, text) {
  const node = document.createElement(tag);
  if (kind) node.className = kind;
  if (text !== undefined) node.textContent = text;
  return node;
}

const number = (value, digits = 2) => (value === null ? "–" : String(Math.round(value * 10 ** digits) / 10 ** digits));

// Only the environment writes result blocks: a result tag in the model's own text is marked as forged.
function colour(author, text) {
  if (author === "search") return [element("span", "result", text)];
  let open = "";
  return text.split(BLOCK).filter(Boolean).map((part) => {
    const tag = /^<(\/?)(\w+)>$/.exec(part);
    if (!tag || !BLOCK.test(part)) return element("span", open, part);
    if (tag[2] === "result") return element("span", "forged", part);
    open = tag[1] ? "" : tag[2];
    return element("span", "mark " + tag[2], part);
  });
}

function card(item, matches) {
  const node = element("div", "item" + (matches ? "" : " dim"));
  const top = element("div", "top");
  top.append(element("span", "phase", item.phase));
  top.append(element("span", item.f1 > 0 ? "good" : "bad", "F1 " + number(item.f1)));
  for (const text of ["reward " + number(item.reward), item.stop.replaceAll("_", " "), item.searches + (item.searches === 1 ? " search" : " searches"),
    item.tokens + " tokens", item.recall === null ? "" : "recall " + number(item.recall)]) {
    if (text) top.append(element("span", "tag", text));
  }
  if (item.fault !== "ok") top.append(element("span", "tag bad", item.fault));
  const body = element("div", "text");
  for (const [author, text] of item.segments) body.append(...colour(author, text));
  if (item.error) body.append(element("span", "forged", "\n" + item.error));
  const last = element("div", "last soft", "prediction: ");
  last.append(element("span", item.f1 > 0 ? "good" : "bad", item.prediction || "(none)"));
  node.append(top, body, last);
  return node;
}

const control = (id) => document.getElementById(id);
const limit = (id, otherwise) => (control(id).value === "" ? otherwise : Number(control(id).value));

function filters() {
  return {
    phases: new Set([...document.querySelectorAll("#phases input:checked")].map((box) => box.value)),
    reward: [limit("reward-low", -Infinity), limit("reward-high", Infinity)],
    searches: [limit("searches-low", -Infinity), limit("searches-high", Infinity)],
    stop: control("stop").value,
    outcome: control("outcome").value,
    words: control("words").value.trim().toLowerCase(),
  };
}

const within = (value, [low, high]) => value >= low - 1e-9 && value <= high + 1e-9;

function accepts(filter, group, item) {
  return within(item.reward, filter.reward) && within(item.searches, filter.searches) && (!filter.stop || item.stop === filter.stop) &&
    (!filter.words || (group.question + "\n" + group.golds.join("\n") + "\n" + item.segments.map((s) => s[1]).join("")).toLowerCase().includes(filter.words));
}

function draw() {
  const filter = filters();
  const list = control("list");
  list.replaceChildren();
  let questions = 0, rollouts = 0;
  for (const group of groups) {
    if (filter.outcome && group.outcome !== filter.outcome) continue;
    const items = group.items.filter((item) => filter.phases.has(item.kind));
    const matching = new Set(items.filter((item) => accepts(filter, group, item)));
    if (matching.size === 0) continue;
    questions += 1;
    rollouts += matching.size;
    if (questions > shown) continue;
    const node = element("section", "group");
    node.append(element("h3", "", group.question));
    node.append(element("div", "about", "gold: " + group.golds.join(" | ") + " · " + group.source +
      (group.hops ? " · " + group.hops + " supporting passage" + (group.hops === 1 ? "" : "s") : "") + (group.outcome ? " · " + group.outcome : "")));
    const row = element("div", "items");
    for (const item of items) row.append(card(item, matching.has(item)));
    node.append(row);
    list.append(node);
  }
  control("count").textContent = `${questions} of ${groups.length} questions, ${rollouts} matching trajectories, showing ${Math.min(questions, shown)}`;
  control("more").className = questions > shown ? "" : "hidden";
}

function options(select, values) {
  for (const value of values) {
    const option = element("option", "", value.replaceAll("_", " "));
    option.value = value;
    select.append(option);
  }
}

function prepare() {
  const kinds = [...new Set(groups.flatMap((group) => group.items.map((item) => item.kind)))];
  for (const kind of kinds) {
    const label = element("label", "", "");
    const box = element("input");
    box.type = "checkbox"; box.value = kind; box.checked = true;
    label.append(box, kind);
    control("phases").append(label);
  }
  options(control("stop"), [...new Set(groups.flatMap((group) => group.items.map((item) => item.stop)))].sort());
  options(control("outcome"), [...new Set(groups.map((group) => group.outcome).filter(Boolean))].sort());
  const again = () => { shown = PAGE; draw(); };
  document.querySelectorAll(".bar input, .bar select").forEach((node) => node.addEventListener("input", again));
  control("more").addEventListener("click", () => { shown += PAGE; draw(); });
  draw();
}

prepare();
