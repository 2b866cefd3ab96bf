// The models side by side: what each writes, the true text as each knows it, how much is recited and at what loss.

import { at, make } from "./dom.js";
import { probability, token, withTips } from "./tokens.js";

export const TITLES = { ordinary: "Ordinary model", open: "Sinks open", closed: "Without sinks" };
const ENDS = { end: "", length: "…", context: " (the model reads no further)" };
const MOST = 2000; // characters of a prompt that are shown, its last
const cards = new Map();
let run = { prompt: "", pieces: [], read: {}, written: {} };

export const view = () => document.querySelector("#views input:checked").value;

/** One card for each column. */
export function lay(columns) {
  cards.clear();
  at("columns").replaceChildren();
  for (const name of columns) {
    const card = at("column").content.cloneNode(true).firstElementChild;
    const [title, box] = [card.querySelector(".title"), card.querySelector(".text")];
    card.classList.add(name);
    title.textContent = TITLES[name];
    if (name === "closed" && columns.includes("open")) card.querySelector(".unit").textContent = "loss (over open)";
    box.setAttribute("aria-label", `${TITLES[name]}: arrow keys go from token to token`);
    withTips(box);
    cards.set(name, card);
    at("columns").append(card);
  }
}

/** Say under a column's name what it is. */
export const describe = (name, text) => cards.get(name) && (cards.get(name).querySelector(".state").textContent = text);

/** Begin anew with a prompt. */
export function clear(prompt) {
  const end = prompt.length > MOST ? `…${prompt.slice(-MOST)}` : prompt;
  run = { prompt: end, pieces: [], read: {}, written: {} };
  for (const card of cards.values()) card.querySelector(".figures").hidden = true;
  draw();
}

/** Take in an event of the server. */
export function take(event) {
  if (event.kind === "read") {
    run.pieces = event.pieces ?? run.pieces;
    run.read[event.column] = event;
    figures();
    if (view() === "reads") draw();
    return;
  }
  (run.written[event.column] ??= []).push(event);
  if (view() === "writes") append(event.column, event);
}

/** Draw all cards in the chosen view. */
export function draw() {
  at("same-legend").hidden = view() === "reads";
  for (const [name, card] of cards) {
    const box = card.querySelector(".text");
    box.replaceChildren(...(view() === "reads" ? trueText(name) : [make("span", { class: "given" }, run.prompt)]));
    if (view() === "writes") (run.written[name] ?? []).forEach((event) => append(name, event));
  }
}

function append(name, event) {
  const box = cards.get(name).querySelector(".text");
  if (event.end !== undefined) {
    box.append(make("span", { class: "end" }, ENDS[event.end]));
    return;
  }
    const same = { true: "\nas in the document", false: "\nnot as in the document" }[event.true] ?? "";
  box.append(token(event.piece, event.p, probability(event.p) + same, event.true === true));
}

function trueText(name) {
  const read = run.read[name];
  if (!read) return [make("span", { class: "given" }, run.prompt ? "A typed prompt: no document to compare with." : "")];
  return run.pieces.map((piece, index) => {
    const p = read.p[index - read.first];
    const span = p === undefined ? make("span", {}, piece) : token(piece, p, tips(index));
    span.classList.toggle("rest", index === read.given);
    return span;
  });
}

const tips = (index) =>
  [...cards.keys()]
    .filter((name) => run.read[name])
    .map((name) => `${TITLES[name]}: ${probability(run.read[name].p[index - run.read[name].first])}`)
    .join("\n");

function figures() {
  const most = Math.max(...Object.values(run.read).map((x) => x.loss), 0.5);
  for (const [name, read] of Object.entries(run.read)) {
    const card = cards.get(name);
    const [list, whole] = [card.querySelector(".figures"), read.recited === read.rest];
    list.hidden = false;
    list.querySelector(".recited").textContent = whole ? `in full (${read.rest})` : `${read.recited} of ${read.rest}`;
    list.querySelector(".loss").textContent = (read.loss < 0.01 ? "< 0.01" : read.loss.toFixed(2)) + change(name, read.loss);
    list.querySelector(".bar-line span").style.width = `${(100 * read.loss) / most}%`;
  }
}

function change(name, loss) {
  const open = run.read.open;
  if (name !== "closed" || !open) return "";
  const by = loss - open.loss;
  return ` (${by < 0 ? "−" : "+"}${Math.abs(by).toFixed(2)})`;
}
