// The atlas of the codebook: the report's, in which a click opens the codeword's page.

import { $, go, make, number, state, tokenizerOf, url } from "./base.js";

export async function showAtlas(get) {
  const { tokenizer } = state;
  const value = await get("/api/atlas", { tokenizer });
  await import("./atlas.js");
  const used = `${number(value.codeword.length)} of ${number(tokenizerOf(tokenizer).codewords)} codewords`;
  const figure = make("figure", { className: "atlas" },
    make("figcaption", {}, `A typical patch of each of ${used}, similar codewords side by side. Click one; the wheel or two fingers zoom.`),
    make("img", { src: url("/atlas", { tokenizer }), alt: `Atlas of ${used}` }),
    make("script", { type: "application/json", textContent: JSON.stringify(value) }));
  $("view-atlas").replaceChildren(figure);
  figure.addEventListener("codeword", (event) => go({ codeword: event.detail, token: null }, { follow: true }));
  globalThis.showAtlas(figure);
  markAtlas();
}

export function clearAtlas() {
  $("view-atlas").replaceChildren(make("p", { className: "quiet" }, "The codewords are arranged: this takes some seconds."));
}

export function markAtlas() {
  const figure = $("view-atlas").querySelector("figure");
  if (state.codeword != null) figure?.dispatchEvent(new CustomEvent("mark", { detail: +state.codeword }));
}
