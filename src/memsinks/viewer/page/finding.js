// Searching documents and owners, and the list that comes of it.

import { ask } from "./api.js";
import { at, count, make } from "./dom.js";

let handlers, isOpen;
let latest = 0;

/** pick: { document(item), owner(item), toggle(owner, on) }; open: whether the sinks of an id are open. */
export function listen(pick, open) {
  [handlers, isOpen] = [pick, open];
  let waiting;
  at("search").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(search, 120);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || event.target.matches("input, textarea")) return;
    event.preventDefault();
    at("search").focus();
  });
}

/** Search for what stands in the field. */
export async function search() {
  const mine = ++latest;
  try {
    const found = await ask("search", { text: at("search").value });
    if (mine !== latest) return; // a later search has been asked for
    at("owners").replaceChildren(...found.owners.map(ownerRow));
    at("documents").replaceChildren(...found.documents.map(documentRow));
    const { documents, owners } = found.counts;
    const more = documents > found.documents.length ? `, ${found.documents.length} shown` : "";
    at("count").textContent =
      documents || owners ? [owners ? count(owners, "owner") : "", count(documents, "document") + more].filter(Boolean).join("; ") : "Nothing found.";
  } catch (error) {
    at("count").textContent = error.message;
  }
}

/** Bring the boxes in line with what is open, and mark what was chosen. */
export function mark(chosen) {
  for (const row of document.querySelectorAll(".list li")) {
    const box = row.querySelector("input");
    if (box) box.checked = isOpen(row.dataset.owner);
    row.classList.toggle("chosen", row.dataset.row === chosen);
  }
}

function openBox(owner) {
  if (!owner) return null;
  const label = `open the sinks of ${owner.name}`;
  const change = (event) => handlers.toggle(owner, event.target.checked);
  return make("input", { type: "checkbox", "aria-label": label, title: label, checked: isOpen(owner.id), disabled: owner.taken, onchange: change });
}

function ownerRow(owner) {
  const facts = owner.taken ? "taken out" : [owner.documents ? count(owner.documents, "document") : "documents not known", owner.own ? "own sinks" : ""];
  const button = make(
    "button",
    { type: "button", class: "pick", onclick: () => handlers.owner(owner) },
    make("b", {}, owner.name),
    make("span", {}, [facts].flat().filter(Boolean).join(", ")),
  );
  return make("li", { "data-owner": owner.id, "data-row": `owner-${owner.id}` }, openBox(owner), button);
}

function documentRow(item) {
  const met = item.owner === null ? "never seen" : { 0: "trained on", 1: "seen once" }[item.met] ?? `seen ${item.met} times`;
  const owner = item.owner && item.owner.name !== item.name && item.owner.by === "source" ? item.owner.name : "";
  const facts = [met, item.owner?.own ? "own sinks" : "", item.owner?.taken ? "taken out" : "", owner === item.source ? "" : owner];
  const button = make(
    "button",
    { type: "button", class: "pick", onclick: () => handlers.document(item) },
    make("b", {}, item.name),
    make("span", {}, facts.filter(Boolean).join(", ")),
    make("span", { class: "excerpt" }, item.excerpt),
  );
  return make("li", { "data-owner": item.owner?.id ?? "", "data-row": `document-${item.index}` }, openBox(item.owner), button);
}
