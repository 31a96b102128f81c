// Masked prediction: patches that the visitor hides, and what the ViT predicts for them.

import { $, ask, go, grid, link, make, mark, number, percent, picture, place, plural, runOf, state, tell, tiles, url } from "./base.js";

let prediction = null;

export async function showRun(get) {
  const run = runOf(state.run), name = state.image;
  for (const id of ["paint", "predicted"]) $(id).replaceChildren();
  for (const id of ["paint", "whole"]) picture($(id), url("/picture", { image: name, size: run.size }), "the image");
  const cells = grid($("paint"), run.grid, "Patches to hide", (row, column) => `hide ${place(`${row},${column}`)}`);
  let value = null; // whether the stroke hides or uncovers
  const set = (cell) => {
    if (!cell?.dataset?.token || !$("paint").contains(cell)) return;
    cell.ariaSelected = String(value);
  };
  const done = () => {
    if (value === null) return;
    value = null;
    go({ mask: cells.map((cell) => (cell.ariaSelected === "true" ? 1 : 0)).join(""), token: null }, { replace: true });
  };
  const start = (cell) => { value = cell.ariaSelected !== "true"; set(cell); };
  const board = $("paint").querySelector(".grid");
  board.onpointerdown = (event) => {
    if (event.button || !event.target.dataset.token) return;
    event.target.releasePointerCapture?.(event.pointerId);
    start(event.target);
  };
  board.onpointermove = (event) => value !== null && set(document.elementFromPoint(event.clientX, event.clientY));
  board.onpointerup = board.onpointerleave = board.onpointercancel = done;
  board.addEventListener("click", (event) => { if (!event.detail) { start(event.target); done(); } }); // by the keyboard
  if (!state.mask || state.mask.length !== cells.length) await drawMask(get, 0);
  else showMask();
}

export async function drawMask(get, seed) {
  go({ mask: (await get("/api/mask", { run: state.run, seed })).mask, token: null }, { replace: true });
}

export function showMask() {
  $("paint").querySelectorAll("button").forEach((cell, index) => { cell.ariaSelected = String(state.mask?.[index] === "1"); });
}

export async function showPrediction(get) {
  const run = runOf(state.run);
  const value = await get("/api/predict", { run: run.name, image: state.image, mask: state.mask });
  prediction = value;
  tell(null);
  picture($("predicted"), value.picture, "the image, with the prediction in the masked patches");
  const holes = new Map(value.tokens.map((one) => [`${one.row},${one.column}`, one]));
  const cells = grid($("predicted"), run.grid, "Predicted patches",
    (row, column) => `${place(`${row},${column}`)}: ${holes.has(`${row},${column}`) ? "predicted" : "visible"}`,
    (token) => holes.has(token) && go({ token, codeword: null }, { follow: true }));
  for (const cell of cells) cell.classList.toggle("hole", holes.has(cell.dataset.token));
  const right = (count) => `${number(count)} (${percent((100 * count) / value.masked)})`;
  const { place: usual, uniform } = value.chance;
  $("told").textContent = `Of the codes of ${plural(value.masked, "hidden patch", "hidden patches")}, ${right(value.right)} are predicted, and ` +
    `${right(value.right_of_top)} are among the five most probable. By chance: ` +
    `${usual == null ? "" : `${percent(usual)} with the most frequent codeword of each place, `}${percent(uniform)} with any codeword.`;
  showHole();
}

export function clearPrediction() {
  prediction = null;
  $("told").textContent = "";
  $("predicted").replaceChildren();
}

export function showHole() {
  if (!prediction || state.view !== "mask") return;
  const tokens = prediction.tokens;
  const one = tokens.find((token) => `${token.row},${token.column}` === state.token) ?? tokens[0];
  const token = `${one.row},${one.column}`, shape = runOf(state.run).grid, name = runOf(state.run).tokenizer;
  for (const id of ["paint", "predicted", "whole"]) mark($(id), token, shape);
  const codes = [one.code, ...one.top.map(([code]) => code)], [truth, ...guesses] = tiles(codes, name);
  const open = (code) => link({ view: "image", tokenizer: name, codeword: code, token: null, mask: null }, {}, `codeword ${code}`);
  const rows = one.top.map(([code, probability], index) => make("tr", {}, make("td", {}, guesses[index]), make("td", {}, open(code)),
    make("td", {}, make("meter", { value: probability, ariaLabel: "probability" }), ` ${percent(100 * probability)}, ${(100 * probability / prediction.chance.uniform).toPrecision(2)} times chance`),
    make("td", {}, code === one.code ? "right" : "")));
  const rank = one.top.findIndex(([code]) => code === one.code);
  const said = rank < 0 ? "is not among the five" : rank ? `is number ${rank + 1} of the five` : "is the most probable one";
  $("answer").replaceChildren(
    make("div", { className: "head" }, truth, make("div", {}, make("h2", {}, `The patch at ${place(token)}`),
      make("p", {}, "Its true code, ", open(one.code), `, ${said}.`))),
    make("table", { className: "top" }, make("thead", {}, make("tr", {}, ...["decoded, example", "predicted", "probability", ""].map(
      (text) => make("th", { scope: "col" }, text)))), make("tbody", {}, ...rows)),
    make("p", { className: "quiet" }, `The chance level: any one codeword has the probability ${percent(prediction.chance.uniform)}.`));
  $("spoken").textContent = `The patch at ${place(token)}: its true code ${said}.`;
}

