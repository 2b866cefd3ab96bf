// Taking an owner out: a dry run, then the same behind a name that is typed.

import { ask, recordAddress } from "./api.js";
import { at, count, make } from "./dom.js";

const TOO_MUCH = "Others would lose more of their blocks than is allowed, so this would be refused. Options say how much is allowed.";
let who = null;
let folder = "";
let changed = () => {};
let busy = false;

/** after: called when somebody was taken out. */
export function listen(after) {
  changed = after;
  at("plan").addEventListener("click", () => send(false));
  at("take").addEventListener("click", confirm);
  at("cancel").addEventListener("click", () => at("confirm").close("cancel"));
  at("typed").addEventListener("input", () => (at("confirmed").disabled = at("typed").value !== who.name));
  at("confirm").addEventListener("close", () => at("confirm").returnValue === "take" && send(true));
  for (const id of ["copies", "collateral", "repair"]) at(id).addEventListener("change", () => (at("take").disabled = true));
}

/** Whom the section is about; null = nobody. */
export function choose(owner) {
  if (busy) return;
  who = owner;
  at("outcome").replaceChildren();
  at("take").disabled = true;
  at("leave-row").hidden = at("leave-more").hidden = !owner || owner.taken;
  at("who").textContent = !owner
    ? "Choose a document or an owner on the list."
    : owner.taken
      ? `${owner.name} was taken out.`
      : `${owner.by === "id" ? "id" : owner.by} ${owner.name}: ${count(owner.documents, "document")}, ` +
        (owner.own ? "sink blocks of his own." : "hashed sink blocks, which others share by chance.");
}

/** The folder that would change, and the records in it. */
export function setRecords(path, records) {
  folder = path;
  const links = records.map((x) => make("li", {}, recordLink(x.name, x.owner), ` ${x.date.slice(0, 10)}`));
  at("records").replaceChildren(...(links.length ? [make("h3", {}, "Records"), make("ul", {}, ...links)] : []));
}

const recordLink = (name, text) => make("a", { href: recordAddress(name), target: "_blank", rel: "noopener" }, text);

function confirm() {
  at("confirm-name").textContent = who.name;
  at("confirm-text").textContent = `This rewrites the files in ${folder} and cannot be undone. A record is written.`;
  at("typed").value = "";
  at("confirmed").disabled = true;
  at("confirm").returnValue = "";
  at("confirm").showModal();
  at("typed").focus();
}

function question(really) {
  return {
    id: who.id,
    do: really,
    typed: really ? at("typed").value : null,
    copies: at("copies").checked,
    collateral: Number(at("collateral").value) / 100,
    repair: Number(at("repair").value),
  };
}

async function send(really) {
  const fields = ["collateral", "repair"].map(at);
  if (busy || !fields.every((x) => x.reportValidity())) return;
  const asked = question(really);
  wait(really ? "Taking out: auditing before and after, rewriting files…" : "Looking through the folder…");
  try {
    const found = await ask("takedown", asked);
    at("outcome").replaceChildren(...outcome(found, really));
    wait("");
    at("take").disabled = really || costsTooMuch(found, asked);
    if (costsTooMuch(found, asked) && !really) at("outcome").append(make("p", { class: "wrong" }, TOO_MUCH));
    if (!really) return;
    at("leave-row").hidden = at("leave-more").hidden = true;
    at("who").textContent = "Choose the next document or owner on the list.";
    await changed(found);
  } catch (error) {
    wait("");
    at("outcome").replaceChildren(make("p", { class: "wrong" }, error.message));
  }
}

const costsTooMuch = (found, asked) => Boolean(found.collateral && found.collateral.most > asked.collateral);

function wait(text) {
  busy = Boolean(text);
  at("plan").disabled = busy;
  if (busy) {
    at("take").disabled = true;
    at("outcome").replaceChildren(make("p", { class: "quiet" }, text));
  }
}

function outcome(found, really) {
  if (found.finished) return [make("p", {}, found.finished), recordLink(found.record, "Its record")];
  const blocks = found.erased.reduce((sum, x) => sum + x.blocks, 0);
  const { rewritten, deleted } = found.files;
  const most = Math.round(100 * found.collateral.most);
  const card = (number, text) => make("div", {}, make("b", {}, number.toLocaleString("en")), text);
  return [
    make("h3", {}, really ? `${found.name} is out.` : "What would happen (nothing was changed)"),
    make(
      "div",
      { class: "cards" },
      card(found.documents, found.documents === 1 ? "document of his" : "documents of his"),
      card(blocks, `sink blocks erased in ${count(found.erased.length, "checkpoint")}`),
      card(rewritten.count + deleted.count, `files rewritten or deleted of ${rewritten.count + deleted.count + found.files.untouched.count}`),
      card(found.collateral.documents, found.collateral.documents ? `others lose up to ${most}% of their blocks` : "others lose a block"),
    ),
    ...found.warnings.map((text) => make("p", { class: "wrong" }, text)),
    found.copies.count ? listed(`${count(found.copies.count, "copy", "copies")} among the documents of others`, found.copies, (x) => `${x.name}: ${x.kind}, ${x.differences}`) : null,
    ...(found.audit.length ? [audit(found.audit)] : really ? [make("p", { class: "quiet" }, "No audit was made: the folder holds no whole model with a tokenizer.")] : []),
    really && found.same_blocks ? make("p", {}, `${found.same_blocks.toLocaleString("en")} sink blocks of others and all shared weights keep every bit.`) : null,
    ...Object.entries(found.files).filter(([, x]) => x.count).map(([fate, x]) => listed(`${count(x.count, "file")} ${fate}`, x, (y) => `${y.path}: ${y.why}`)),
    found.record ? make("p", {}, recordLink(found.record, "The record"), " says what was done; memsinks verify checks it.") : null,
  ].filter((x) => x !== null);
}

function listed(title, { count: number, shown }, text) {
  const more = number > shown.length ? [make("li", { class: "quiet" }, `and ${number - shown.length} more`)] : [];
  return make("details", {}, make("summary", {}, title), make("ul", {}, ...shown.map((x) => make("li", {}, text(x))), ...more));
}

function audit(rows) {
  const cells = (side) => (side ? [side.loss.toFixed(3), `${Math.round(100 * side.recited)}%`] : ["–", "–"]);
  const head = ["", "loss before", "recited", "loss after", "recited"].map((x) => make("th", { scope: "col" }, x));
  const lines = rows.map((row) => make("tr", {}, ...[row.who, ...cells(row.before), ...cells(row.after)].map((x) => make("td", {}, x))));
  return make("div", { class: "scroll" }, make("table", {}, make("tr", {}, ...head), ...lines));
}
