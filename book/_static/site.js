"use strict";

/* What scrolls sideways is marked, and can be reached with the keyboard; what does not is no tab stop. */
const BOXES = "article mjx-container[display='true'], article div.pst-scrollable-table-container, article pre, article .wide-formula";

function mark() {
  for (const formula of document.querySelectorAll('article mjx-container:not([display="true"])')) {
    const parent = formula.parentElement;
    if (!formula.classList.contains("wide-formula") && formula.offsetWidth > parent.clientWidth && parent.clientWidth)
      formula.classList.add("wide-formula");
  }
  for (const box of document.querySelectorAll(BOXES)) {
    const scrolls = box.scrollWidth > box.clientWidth + 1;
    box.classList.toggle("scrolls", scrolls);
    if (scrolls) box.setAttribute("tabindex", "0");
    else box.removeAttribute("tabindex");
  }
}

/* A click on a figure shows it as large as it was drawn, or as the window allows if that is more. */
function enlarge(picture) {
  const dialog = document.createElement("dialog");
  const close = document.createElement("button");
  const large = new Image();
  dialog.className = "enlarged";
  dialog.setAttribute("aria-label", "Enlarged figure");
  close.textContent = "Close";
  large.src = picture.src;
  large.alt = picture.alt;
  large.style.width = `max(100%, ${picture.naturalWidth}px)`;
  dialog.append(close, large);
  document.body.append(dialog);
  dialog.addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => dialog.remove());
  dialog.showModal();
}

function makeFiguresLarge() {
  for (const picture of document.querySelectorAll("article figure img")) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "enlarge";
    button.title = "Enlarge this figure";
    picture.replaceWith(button);
    button.append(picture);
    button.addEventListener("click", () => enlarge(picture));
  }
}

/* On paper nothing is folded. */
function unfold() {
  for (const box of document.querySelectorAll("details:not([open])")) {
    box.open = true;
    box.dataset.folded = "";
  }
  for (const box of document.querySelectorAll(".toggle-hidden")) {
    box.classList.remove("toggle-hidden");
    box.dataset.folded = "";
  }
}

function foldAgain() {
  for (const box of document.querySelectorAll("[data-folded]")) {
    delete box.dataset.folded;
    if (box.tagName === "DETAILS") box.open = false;
    else box.classList.add("toggle-hidden");
  }
}

/* The text waits for its formulas, which would push it down; `waiting` is set in the head of pages that have any. */
function show() {
  document.documentElement.classList.remove("waiting");
  mark();
}

document.addEventListener("DOMContentLoaded", makeFiguresLarge);
window.addEventListener("load", () => Promise.resolve(window.MathJax?.startup?.promise).then(show, show));
document.fonts.ready.then(mark);
window.addEventListener("resize", mark);
window.addEventListener("toggle", mark, true);
window.matchMedia("print").addEventListener("change", mark);
window.addEventListener("beforeprint", unfold);
window.addEventListener("afterprint", foldAgain);
