// The shown image: its token map, its reconstruction and its error.

import { $, go, grid, make, mark, picture, place, plural, setup, state, tokenizerOf, url } from "./base.js";

let image = null; // codes and colours of the shown image


function choose(token) {
  if (!image || !token) return;
  const [row, column] = token.split(",").map(Number);
  go({ token, codeword: image.codes[row][column] }, { follow: true });
}

// Chooses the token at a part of the picture's width and height.
export function chooseAt(x, y) {
  const at = (part, number) => Math.min(Math.max(Math.floor(part * number), 0), number - 1);
  if (image) choose(`${at(y, image.codes.length)},${at(x, image.codes[0].length)}`);
}

export async function showImage(get) {
  const { tokenizer, image: name } = state;
  const value = await get("/api/image", { tokenizer, image: name });
  image = value;
  const size = tokenizerOf(tokenizer).size;
  $("about").textContent = [
    value.name.split("/").pop(), value.class, `${value.codes.length} x ${value.codes[0].length} tokens`,
    plural(value.distinct, "different codeword"), `PSNR ${value.psnr} dB`,
  ].filter(Boolean).join(" · ");
  picture($("original"), url("/picture", { image: name, size }), `the image ${value.name}`);
  picture($("restored"), url("/picture", { image: name, tokenizer, kind: "restored" }), "its reconstruction from the tokens");
  picture($("error"), url("/picture", { image: name, tokenizer, kind: "error" }), "the error of the reconstruction");
  const describe = (row, column) => `${place(`${row},${column}`)}: codeword ${value.codes[row][column]}`;
  const cells = grid($("map"), [value.codes.length, value.codes[0].length], "Token map", describe, choose);
  for (const cell of cells) {
    const [row, column] = cell.dataset.token.split(",").map(Number);
    cell.style.backgroundColor = value.colours[row][column];
    cell.dataset.codeword = value.codes[row][column];
  }
  const token = state.token && $("map").querySelector(`[data-token="${state.token}"]`);
  // After a switch of the tokenizer the chosen token has another codeword.
  if (token && state.codeword == null) go({ codeword: token.dataset.codeword }, { replace: true });
  else showChoice();
}

export function clearImage() {
  image = null;
  for (const id of ["map", "original", "restored", "error"]) $(id).replaceChildren();
  $("about").textContent = "";
}

export function showChoice() {
  if (!image) return;
  const shape = [image.codes.length, image.codes[0].length];
  const [row, column] = (state.token ?? "").split(",").map(Number);
  const token = String(image.codes[row]?.[column]) === String(state.codeword) ? state.token : null;
  for (const id of ["map", "original", "restored", "error"]) mark($(id), token, shape);
  for (const cell of $("map").querySelectorAll("button")) {
    cell.classList.toggle("same", cell.dataset.codeword === String(state.codeword));
    cell.ariaSelected = cell.dataset.token === token;
    if (token) cell.tabIndex = cell.dataset.token === token ? 0 : -1;
  }
}

export function showOther() {
  const others = setup.tokenizers.filter((one) => one.name !== state.tokenizer);
  $("beside").hidden = !others.length;
  const other = others.find((one) => one.name === state.other)?.name ?? "";
  $("other").replaceChildren(...["", ...others.map((one) => one.name)].map((name) => new Option(name || "none", name)));
  $("other").value = other;
  $("slider").hidden = !other;
  $("restored").querySelector(".other")?.remove();
  if (!other) return;
  const source = url("/picture", { image: state.image, tokenizer: other, kind: "restored" });
  $("restored").append(make("img", { className: "other", src: source, alt: `the reconstruction of ${other}, at the right` }));
  slide();
}

export function slide() {
  const other = $("restored").querySelector(".other");
  if (other) other.style.clipPath = `inset(0 0 0 ${100 - $("slider").value}%)`;
}

