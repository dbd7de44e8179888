"use strict";
// Everything that the policy or a passage wrote reaches the page as textContent.
const KEPT = 30;
const HISTORY = "research-agent-history";
const TOKEN = "research-agent-token";
const QUESTION = "question=";
const STOPS = {
  malformed: "the policy ended without a complete answer",
  search_limit: "the policy wanted more searches than allowed",
  token_limit: "the response reached its limit of tokens",
  time_limit: "the time was used up",
};
const control = (id) => document.getElementById(id);
let running = null;

function element(tag, kind, text) {
  const node = document.createElement(tag);
  if (kind) node.className = kind;
  if (text !== undefined) node.textContent = text;
  return node;
}

// Storage may be switched off or full; the page then works without a memory.
function remember(storage, key, value) {
  try { storage.setItem(key, value); } catch { /* nothing is kept */ }
}
function recall(storage, key) {
  try { return storage.getItem(key); } catch { return null; }
}

function headers() {
  const token = recall(sessionStorage, TOKEN);
  return { "Content-Type": "application/json", ...(token ? { Authorization: "Bearer " + token } : {}) };
}

function say(text, bad) {
  control("status").textContent = text;
  control("status").className = bad ? "trouble" : "";
}

function askForToken(why) {
  control("token-form").hidden = false;
  if (why) say(why, true);
  control("token").focus();
}

async function reason(reply) {
  try {
    const content = await reply.json();
    return (content.error && content.error.message) || content.detail || "HTTP " + reply.status;
  } catch {
    return "HTTP " + reply.status;
  }
}

async function connect() {
  try {
    const reply = await fetch("/v1/models", { headers: headers() });
    if (reply.status === 401) {
      control("model").textContent = "";
      askForToken(recall(sessionStorage, TOKEN) ? "The token is wrong." : "");
      return;
    }
    if (!reply.ok) throw new Error(await reason(reply));
    control("token-form").hidden = true;
    // The last name is the model's own; the first one is the service's.
    control("model").textContent = (await reply.json()).data.at(-1).id;
    say("");
    control("question").focus();
  } catch (error) {
    control("model").textContent = "";
    say("The service does not answer: " + error.message, true);
  }
}

// One answer on the page, drawn from the events of the Responses format, or at once from a kept response.
class Run {
  constructor(place) {
    this.place = place;
    this.blocks = new Map();
    this.passages = new Map();
    this.searches = 0;
  }

  block(kind, who) {
    const node = element("div", "block " + kind);
    node.append(element("span", "who", who));
    const text = element("span");
    node.append(text);
    this.place.append(node);
    return { node, text };
  }

  open(item) {
    if (this.blocks.has(item.id)) return this.blocks.get(item.id);
    let block;
    if (item.type === "file_search_call") {
      block = { ...this.block("search", "search"), number: this.searches++ };
      block.text.textContent = item.queries[0] || "(no query)";
    } else {
      block = item.type === "message" ? this.block("answer", "answer") : this.block("thought", "thought");
    }
    this.blocks.set(item.id, block);
    return block;
  }

  done(item) {
    const block = this.open(item);
    if (item.type !== "file_search_call") {
      block.text.textContent = item.content.map((part) => part.text).join("");
      return;
    }
    if (item.error) block.node.append(element("p", "trouble", "search failed: " + item.error));
    (item.results || []).forEach((result, rank) => this.passage(block, result, rank));
    if (!item.error && !(item.results || []).length) block.node.append(element("p", "soft", "nothing was found"));
  }

  passage(block, result, rank) {
    const node = element("details", "passage");
    node.append(element("summary", "", rank + 1 + ". " + (result.filename || result.file_id)));
    const text = element("div", "text", result.text);
    node.append(text);
    block.node.append(node);
    this.passages.set(block.number + "/" + rank, { node, text, contents: result.text });
  }

  take(event) {
    switch (event.type) {
      case "response.output_item.added": this.open(event.item); break;
      case "response.output_item.done": this.done(event.item); break;
      case "response.reasoning_text.delta":
      case "response.output_text.delta": this.blocks.get(event.item_id).text.append(event.delta); break;
      default: break;
    }
  }

  finish(response, verdict) {
    const told = response.research;
    const facts = element("div", "block");
    if (response.status === "failed") facts.append(element("p", "trouble", "No answer: " + response.error.message));
    else if (told.answer === null) facts.append(element("p", "trouble", "No answer: " + (STOPS[told.stop_reason] || told.stop_reason)));
    else if (response.status === "incomplete") facts.append(element("p", "trouble", "Cut off: " + (STOPS[told.stop_reason] || told.stop_reason)));
    if (told.supported === true) facts.append(element("p", "good", "The answer stands in a passage that the policy read."));
    if (told.supported === false) facts.append(element("p", "trouble", "The answer stands in no passage that the policy read."));
    if (told.citations.length) facts.append(this.citations(told.citations));
    const searches = told.searches + (told.searches === 1 ? " search" : " searches");
    facts.append(element("p", "soft", searches + ", " + told.seconds.total.toFixed(1) + " s, " + response.usage.output_tokens + " tokens written, " +
      response.usage.input_tokens + " read"));
    facts.append(verdictForm(response.id, verdict));
    this.place.append(facts);
  }

  citations(list) {
    const row = element("div", "citations");
    for (const cited of list) {
      const passage = this.passages.get(cited.search + "/" + cited.rank);
      if (!passage) continue;
      const where = "search " + (cited.search + 1) + ", passage " + (cited.rank + 1) + ": " + cited.text + (cited.read ? "" : " (found, but cut off before it was read)");
      const button = element("button", "", where);
      button.type = "button";
      button.addEventListener("click", () => show(passage, cited));
      row.append(button);
    }
    return row;
  }
}

function show(passage, cited) {
  // Offsets count code points, JavaScript's strings UTF-16 units.
  const points = Array.from(passage.contents);
  passage.text.replaceChildren(points.slice(0, cited.start).join(""),
    element("mark", "", points.slice(cited.start, cited.end).join("")), points.slice(cited.end).join(""));
  passage.node.open = true;
  passage.node.querySelector("summary").focus();
  passage.node.scrollIntoView({ block: "center" });
}

// What a person says of an answer: two buttons, and behind them what would have been right.
function verdictForm(identifier, said) {
  const form = element("form", "verdict"), row = element("div", "row"), more = element("div", "more row");
  for (const [verdict, text] of [["up", "👍 Good answer"], ["down", "👎 Bad answer"]]) {
    const button = element("button", "", text);
    button.type = "button";
    button.value = verdict;
    button.setAttribute("aria-pressed", String(said === verdict));
    button.addEventListener("click", () => judge(form, identifier, verdict));
    row.append(button);
  }
  const share = element("button", "", "Link to this question");
  share.type = "button";
  share.addEventListener("click", () => shareLink(row));
  row.append(share);
  for (const [name, text, longest] of [["answer", "The right answer, if you know it", 1000], ["comment", "Comment", 2000]]) {
    const label = element("label", "", text), input = element("input");
    input.name = name;
    input.maxLength = longest;
    input.autocomplete = "off";
    label.append(input);
    more.append(label);
  }
  const send = element("button", "", "Send");
  send.type = "submit";
  more.append(send);
  more.hidden = !said;
  form.append(row, more);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    judge(form, identifier, form.querySelector('[aria-pressed="true"]').value);
  });
  return form;
}

async function judge(form, identifier, verdict) {
  const body = { response_id: identifier, verdict };
  for (const name of ["answer", "comment"]) {
    const text = form.elements[name].value.trim();
    if (text) body[name] = text;
  }
  try {
    const reply = await fetch("/v1/feedback", { method: "POST", headers: headers(), body: JSON.stringify(body) });
    if (reply.status === 401) { askForToken("The service asks for its token."); return; }
    if (!reply.ok) { say(await reason(reply), true); return; }
  } catch (error) {
    say("The verdict was not taken: " + error.message, true);
    return;
  }
  for (const button of form.querySelectorAll("[aria-pressed]")) button.setAttribute("aria-pressed", String(button.value === verdict));
  form.querySelector(".more").hidden = false;
  rememberVerdict(identifier, verdict);
  say("Your verdict is kept.");
}

// The question alone is in the link: whoever opens it asks with a token of their own.
async function shareLink(row) {
  const link = location.origin + location.pathname + "#" + QUESTION + encodeURIComponent(control("run").querySelector("h2").textContent);
  try {
    await navigator.clipboard.writeText(link);
    say("The link is in the clipboard.");
  } catch {
    // Without https, and where the browser forbids it, the link is shown to be copied by hand.
    const shown = row.querySelector(".link") || element("input", "link");
    shown.readOnly = true;
    shown.value = link;
    shown.setAttribute("aria-label", "Link to this question");
    row.append(shown);
    shown.select();
  }
}

async function* events(body) {
  const reader = body.getReader(), decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + decoder.decode(value, { stream: true })).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data:") && line.slice(5).trim() !== "[DONE]") yield JSON.parse(line.slice(5));
    }
  }
}

function limits() {
  const given = {};
  for (const name of ["max_searches", "top_k", "wall_s"]) if (control(name).value !== "") given[name] = Number(control(name).value);
  return given;
}

async function ask(question) {
  const place = control("run");
  place.replaceChildren(element("h2", "", question));
  const run = new Run(place);
  const mine = running = new AbortController();
  busy(true);
  say("The policy answers");
  control("status").className = "working";
  try {
    const reply = await fetch("/v1/responses", {
      method: "POST", headers: headers(), signal: mine.signal, body: JSON.stringify({ input: question, stream: true, ...limits() }),
    });
    if (reply.status === 401) { askForToken("The service asks for its token."); return; }
    if (!reply.ok) { say(await reason(reply), true); return; }
    await follow(reply.body, run, question);
  } catch (error) {
    if (error.name === "AbortError") say("Stopped.");
    else say("The connection to the service broke: " + error.message, true);
  } finally {
    running = null;
    busy(false);
  }
}

async function follow(body, run, question) {
  let response = null;
  for await (const event of events(body)) {
    run.take(event);
    if (event.response && event.response.status !== "in_progress") response = event.response;
  }
  if (response === null) { say("The service ended before the answer did; ask again.", true); return; }
  run.finish(response);
  say(response.status === "failed" ? "The model server failed." : "Done.", response.status === "failed");
  // For those who hear the page: what arrived bit by bit is read out once it is whole.
  const answer = response.research && response.research.answer;
  control("spoken").textContent = answer ? "The answer: " + answer : "";
  keep(question, response);
}

function busy(on) {
  // Not `disabled`, and not hidden while it has the focus: either would take the focus from who uses the keyboard.
  control("ask").setAttribute("aria-disabled", on);
  if (!on && document.activeElement === control("stop")) control("question").focus();
  control("stop").hidden = !on;
}

function earlier() {
  try {
    const kept = JSON.parse(recall(localStorage, HISTORY) || "[]");
    return Array.isArray(kept) ? kept : [];
  } catch {
    return [];
  }
}

function keep(question, response) {
  const kept = [{ question, response }, ...earlier().filter((entry) => entry.question !== question)].slice(0, KEPT);
  // A browser keeps about 5 MB for a page: the oldest give way.
  while (kept.length > 1 && JSON.stringify(kept).length > 2000000) kept.pop();
  remember(localStorage, HISTORY, JSON.stringify(kept));
  list();
}

function rememberVerdict(identifier, verdict) {
  const kept = earlier().map((entry) => (entry.response.id === identifier ? { ...entry, verdict } : entry));
  remember(localStorage, HISTORY, JSON.stringify(kept));
  list();
}

function list() {
  const kept = earlier();
  control("past").hidden = kept.length === 0;
  control("history").replaceChildren(...kept.map((entry) => {
    const item = element("li"), button = element("button", "", entry.question);
    button.type = "button";
    button.addEventListener("click", () => { if (!running) again(entry); });
    item.append(button);
    return item;
  }));
}

function again(entry) {
  const place = control("run");
  place.replaceChildren(element("h2", "", entry.question));
  const run = new Run(place);
  for (const item of entry.response.output) run.done(item);
  run.finish(entry.response, entry.verdict);
  control("question").value = entry.question;
  say("From " + new Date(entry.response.created_at * 1000).toLocaleString() + ".");
  place.scrollIntoView({ block: "start" });
}

// What stands behind # is a question or the token; it does not stay in the address.
function takeHash() {
  if (location.hash.length <= 1) return;
  let given = location.hash.slice(1);
  try { given = decodeURIComponent(given); } catch { /* a % that begins no character: taken as it stands */ }
  if (given.startsWith(QUESTION)) control("question").value = given.slice(QUESTION.length);
  else remember(sessionStorage, TOKEN, given);
  history.replaceState(null, "", location.pathname);
}

function prepare() {
  takeHash();
  window.addEventListener("hashchange", () => { takeHash(); connect(); });
  control("token-form").addEventListener("submit", (event) => {
    event.preventDefault();
    remember(sessionStorage, TOKEN, control("token").value.trim());
    control("token").value = "";
    connect();
  });
  control("ask-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const question = control("question").value.trim();
    if (question && !running) ask(question);
  });
  control("question").addEventListener("keydown", (event) => {
    // While an input method composes a word, Enter chooses it.
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); control("ask-form").requestSubmit(); }
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape" && running) running.abort(); });
  control("stop").addEventListener("click", () => { if (running) running.abort(); });
  control("forget").addEventListener("click", () => { remember(localStorage, HISTORY, "[]"); list(); });
  list();
  connect();
}

prepare();
