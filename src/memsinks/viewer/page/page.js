// The page: what is chosen and open, and asking the models.

import { ask, events } from "./api.js";
import * as columns from "./columns.js";
import { at, make } from "./dom.js";
import * as finding from "./finding.js";
import * as leaving from "./leaving.js";

const open = new Map(); // id -> owner
let chosen = null; // document whose beginning is the prompt; null of a typed one
let row = ""; // of the list
let begun = 0; // how often a beginning was asked for
let running = null; // AbortController
let known = { columns: [], sinks: false };

const say = (text, wrong = false) => {
  at("status").textContent = text;
  at("status").className = wrong ? "wrong" : "quiet";
};

async function refresh() {
  try {
    known = await ask("state");
  } catch (error) {
    at("name").textContent = "memsinks view";
    at("notes").replaceChildren(make("p", {}, error.message));
    return;
  }
  document.title = `${known.name} · memsinks view`;
  at("name").textContent = known.name;
  at("facts").replaceChildren(...known.facts.map((x) => make("li", {}, x)));
  at("notes").replaceChildren(...known.notes.map((x) => make("p", {}, x)));
  at("write").disabled = !known.readable;
  at("open-row").hidden = at("leave").hidden = !known.sinks;
  at("chat-row").hidden = !known.chat;
  columns.lay(known.columns);
  leaving.setRecords(known.folder, known.records);
  showOpen();
}

// Whose sinks are open

function showOpen() {
  const names = [...open.values()].map((x) => x.name);
  const chips = [...open.values()].map((owner) => {
    const close = () => toggle(owner, false);
    return make("span", { class: "chip", role: "listitem" }, owner.name, make("button", { type: "button", "aria-label": `close ${owner.name}`, onclick: close }, "×"));
  });
  at("opened").replaceChildren(...(chips.length ? chips : [make("span", { class: "quiet" }, "none")]));
  columns.describe("open", names.length ? `of ${names.join(", ")}` : "nobody's: the same as without");
  columns.describe("ordinary", known.ordinary);
  columns.describe("closed", known.sinks ? "what stays after removal" : "the model as it is");
  finding.mark(row);
}

function toggle(owner, on) {
  if (on) open.set(owner.id, owner);
  else open.delete(owner.id);
  empty();
  showOpen();
}

async function openNamed(event) {
  if (event.key !== "Enter") return;
  event.preventDefault();
  try {
    const owner = await ask("named", { name: at("open-name").value });
    if (owner.taken) throw new Error(`${owner.name} was taken out; his sinks can be opened no more.`);
    toggle(owner, true);
    at("open-name").value = "";
    say("");
  } catch (error) {
    say(error.message, true);
  }
}

// The prompt

async function pickDocument(item) {
  say("Reading…");
  row = `document-${item.index}`;
  open.clear();
  if (item.owner && !item.owner.taken && known.sinks) open.set(item.owner.id, item.owner);
  leaving.choose(item.owner);
  empty();
  showOpen();
  chosen = { index: item.index, given: null, chat: false };
  if (known.readable) await begin();
  else say("");
}

async function begin() {
  const mine = ++begun;
  try {
    const found = await ask("begin", { document: chosen.index, given: chosen.given, version: known.version });
    if (mine !== begun || !chosen) return; // another document was picked, or something typed, meanwhile
    [chosen.chat, at("chat").checked] = [found.chat, known.chat && found.chat];
    [at("prompt").value, at("given").max, at("given").value] = [found.text, found.tokens - 1, found.given];
    at("given-out").textContent = `${found.given} of ${found.tokens}`;
    at("given-row").hidden = false;
    at("tokens").value = Math.min(512, Math.max(1, found.tokens - found.given));
    say("");
    write();
  } catch (error) {
    if (mine === begun) failed(error);
  }
}

function pickOwner(owner) {
  row = `owner-${owner.id}`;
  open.clear();
  if (!owner.taken) open.set(owner.id, owner);
  leaving.choose(owner);
  empty();
  showOpen();
}

// What stands in the columns was written with other sinks open, or after another beginning.
function empty() {
  running?.abort();
  columns.clear("");
}

function edited() {
  chosen = null;
  at("given-row").hidden = true;
  row = row.startsWith("document") ? "" : row;
  finding.mark(row);
}

// Asking the models

async function write() {
  if (!known.readable || !at("ask").reportValidity()) return;
  running?.abort();
  const mine = (running = new AbortController());
  const question = chosen
    ? { document: chosen.index, given: chosen.given }
    : { text: at("prompt").value, chat: at("chat").checked };
  const chat = chosen ? chosen.chat : at("chat").checked;
  columns.clear(at("prompt").value + (chat ? "\n" : ""));
  at("stop").disabled = false;
  say("Writing…");
  try {
    const asked = { ...question, version: known.version, open: [...open.keys()], tokens: Number(at("tokens").value) };
    for await (const event of events("run", asked, mine.signal)) {
      if (running === mine) columns.take(event);
    }
    if (running === mine) say("Done.");
  } catch (error) {
    if (running !== mine) return;
    if (error.name === "AbortError") say("Stopped.");
    else failed(error);
  }
  if (running === mine) at("stop").disabled = true;
}

function failed(error) {
  say(error.message, true);
  if (error.message.startsWith("an owner was taken out")) renew(); // by another page
}

async function afterTakedown() {
  empty();
  await renew();
}

async function renew() {
  open.clear();
  [chosen, row] = [null, ""];
  await refresh();
  at("given-row").hidden = true;
  columns.clear("");
  await finding.search();
  finding.mark(row);
}

finding.listen({ document: pickDocument, owner: pickOwner, toggle }, (id) => open.has(id));
leaving.listen(afterTakedown);
at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  write();
});
at("prompt").addEventListener("input", edited);
at("prompt").addEventListener("keydown", (event) => event.key === "Enter" && (event.ctrlKey || event.metaKey) && write());
at("given").addEventListener("input", () => (at("given-out").textContent = `${at("given").value} of ${Number(at("given").max) + 1}`));
at("given").addEventListener("change", () => {
  chosen = chosen && { ...chosen, given: Number(at("given").value) };
  if (chosen) begin();
});
at("open-name").addEventListener("keydown", openNamed);
at("stop").addEventListener("click", () => running?.abort());
at("views").addEventListener("change", () => columns.draw());
await refresh();
await finding.search();
