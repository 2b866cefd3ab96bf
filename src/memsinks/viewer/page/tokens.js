// Tokens shaded by their probability, and the number that shows where pointer or keys are.

import { at, make } from "./dom.js";

/** A token. tip: text that shows on it. */
export function token(piece, p, tip, same = false) {
  const shown = piece.replaceAll("\n", "↵\n");
  const span = make("span", { class: same ? "token same" : "token", "data-tip": tip }, shown);
  span.style.setProperty("--p", p);
  return span;
}

export const probability = (p) => (p >= 0.9995 ? "p > 0.999" : p < 0.0005 ? "p < 0.001" : `p = ${p.toFixed(3)}`);

function show(span) {
  hide();
  const tip = at("tip");
  span.classList.add("at");
  tip.textContent = span.dataset.tip;
  tip.hidden = false;
  const box = span.getClientRects()[0] ?? span.getBoundingClientRect();
  const left = Math.min(box.left, innerWidth - tip.offsetWidth - 8);
  const above = box.top - tip.offsetHeight - 6;
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${above > 4 ? above : box.bottom + 6}px`;
}

function hide() {
  at("tip").hidden = true;
  document.querySelectorAll(".token.at").forEach((x) => x.classList.remove("at"));
}

function step(box, key) {
  const all = [...box.querySelectorAll(".token")];
  const now = all.findIndex((x) => x.classList.contains("at"));
  const next = { ArrowRight: now + 1, ArrowLeft: now < 0 ? all.length - 1 : now - 1, Home: 0, End: all.length - 1 }[key];
  const span = all[Math.max(0, Math.min(next, all.length - 1))];
  if (!span) return;
  span.scrollIntoView({ block: "nearest" });
  show(span);
}

/** Numbers on the tokens of a box: under the pointer, a finger, or the arrow keys when the box has the focus. */
export function withTips(box) {
  for (const name of ["pointerover", "click"]) {
    box.addEventListener(name, (event) => event.target.dataset?.tip && show(event.target));
  }
  box.addEventListener("pointerleave", hide);
  box.addEventListener("scroll", hide);
  box.addEventListener("blur", hide);
  box.addEventListener("keydown", (event) => {
    if (event.key === "Escape") hide();
    if (!["ArrowRight", "ArrowLeft", "Home", "End"].includes(event.key)) return;
    event.preventDefault();
    step(box, event.key);
  });
}
