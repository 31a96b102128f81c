// The page of `pecobook explore`: brings everything up to date with the address, and hears the visitor.

import { $, VIEWS, ask, go, link, make, parts, read, setup, state, tell, tokenizerOf, update, url } from "./base.js";
import { clearAtlas, markAtlas, showAtlas } from "./atlasview.js";
import { showCodeword, showCurrent, showList } from "./codewords.js";
import { chooseAt, clearImage, showChoice, showImage, showOther, slide } from "./image.js";
import { clearPrediction, drawMask, showHole, showMask, showPrediction, showRun } from "./masked.js";

function render(follow = false) {
  read();
  tell(null);
  const { view, tokenizer, codeword, sort, page, run, mask } = state;
  document.title = `${codeword == null ? VIEWS[view] : `Codeword ${codeword}`} · pecobook explore`;
  $("views").replaceChildren(...Object.keys(VIEWS).filter((name) => name !== "mask" || setup.runs.length).map((name) => {
    const changes = name === "mask" || view === "mask" ? { view: name, codeword: null, token: null } : { view: name };
    const tab = link(changes, {}, VIEWS[name]);
    if (name === view) tab.setAttribute("aria-current", "page");
    return tab;
  }));
  for (const name of Object.keys(VIEWS)) $(`view-${name}`).hidden = name !== view;
  $("images").hidden = view === "codewords" || view === "atlas";
  $("about").hidden = view === "mask";
  $("choose-tokenizer").hidden = view === "mask" || setup.tokenizers.length < 2;
  $("tokenizer").value = tokenizer;
  $("sort").value = sort;
  $("run").value = run ?? "";
  for (const one of $("thumbnails").children) one.ariaPressed = String(one.dataset.image === state.image);
  const json = JSON.stringify;
  if (view === "image") {
    update("image", json([tokenizer, state.image]), showImage, clearImage);
    showOther();
    showChoice();
  }
  if (view === "codewords") {
    update("list", json([tokenizer, sort, page]), showList);
    showCurrent();
  }
  if (view === "atlas") {
    update("atlas", tokenizer, showAtlas, clearAtlas);
    markAtlas();
  }
  if (view === "mask") {
    update("run", json([run, state.image]), showRun, clearPrediction);
    if (mask) {
      showMask();
      update("prediction", json([run, state.image, mask]), showPrediction, clearPrediction);
    }
    parts.answer = undefined;
    showHole();
  } else if (codeword == null) {
    update("answer", view, () => $("answer").replaceChildren(make("p", { className: "quiet" }, view === "image"
      ? "Choose a token of the map: here appear its codeword, other patches with it, their places and classes, and the nearest codewords."
      : "Choose a codeword.")));
  } else {
    update("answer", json([tokenizer, codeword]), showCodeword, () => $("answer").replaceChildren());
  }
  if (follow) followTap();
}

// On a phone the answer stands below: it comes up, and what was tapped stays in sight.
function followTap() {
  $("answer").scrollTop = 0;
  if (!matchMedia("(max-width: 800px)").matches) return;
  const top = $("answer").getBoundingClientRect().top - innerHeight / 2;
  const tapped = $("left").querySelector("#map .mark, #predicted .mark")?.getBoundingClientRect();
  const limit = tapped?.height ? tapped.top - 8 : Infinity;
  if (top > 0) scrollBy({ top: Math.min(top, limit), behavior: "instant" });
}

let strip = 0;

async function showStrip() {
  const { pages, images } = await ask("/api/images", { page: strip });
  $("more").hidden = pages < 2;
  $("thumbnails").replaceChildren(...images.map((one) => {
    const alt = `held-out image ${one.image}${one.class ? `, ${one.class}` : ""}`;
    const button = make("button", { type: "button", title: one.name, ariaPressed: String(one.image === state.image) },
      make("img", { src: url("/picture", { image: one.image, size: setup.thumbnail }), alt }));
    button.dataset.image = one.image;
    button.onclick = () => show(one.image);
    return button;
  }));
  return images;
}

const show = (name) => go({ image: name, token: null, codeword: null });

async function upload(file) {
  if (!file) return;
  try {
    if (file.size > setup.uploadMb * 1e6) throw new Error(`This file has more than ${setup.uploadMb} MB, the limit of --upload-mb.`);
    show((await ask("/api/upload", {}, { method: "POST", body: file })).image);
  } catch (error) {
    tell(error);
  } finally {
    $("upload").value = ""; // so that the same file can be chosen again
  }
}

function listen() {
  $("tokenizer").onchange = () => {
    let { token } = state;
    if (token) { // the same part of the image in the other grid
      const [from, to] = [state.tokenizer, $("tokenizer").value].map((name) => tokenizerOf(name).grid);
      token = token.split(",").map((part, axis) => Math.floor(((+part + 0.5) * to[axis]) / from[axis])).join(",");
    }
    go({ tokenizer: $("tokenizer").value, token, codeword: null, page: 1, other: null });
  };
  $("sort").onchange = () => go({ sort: $("sort").value, page: 1 });
  $("previous").onclick = () => go({ page: +state.page - 1 });
  $("next").onclick = () => go({ page: +state.page + 1 });
  $("run").onchange = () => go({ run: $("run").value, mask: null, token: null });
  $("other").onchange = () => go({ other: $("other").value }, { replace: true });
  $("slider").oninput = slide;
  let seed = 0;
  $("draw").onclick = () => drawMask(ask, ++seed).catch(tell);
  $("clear").onclick = () => go({ mask: state.mask.replaceAll("1", "0"), token: null }, { replace: true });
  $("more").onclick = () => { strip++; showStrip().catch(tell); };
  $("find").onsubmit = (event) => {
    event.preventDefault();
    const changes = { codeword: $("number").value.trim() || null, token: null };
    go(state.view === "mask" ? { ...changes, view: "image" } : changes, { follow: true });
  };
  for (const id of ["original", "restored", "error"]) {
    $(id).onclick = (event) => {
      const box = $(id).getBoundingClientRect();
      chooseAt((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
    };
  }
  $("upload").onchange = () => upload($("upload").files[0]);
  document.ondragover = (event) => { event.preventDefault(); document.body.classList.add("dragged"); };
  document.ondragleave = (event) => { if (!event.relatedTarget) document.body.classList.remove("dragged"); };
  document.ondrop = (event) => {
    event.preventDefault();
    document.body.classList.remove("dragged");
    upload(event.dataTransfer.files[0]);
  };
  addEventListener("popstate", () => render());
  addEventListener("address", (event) => render(event.detail.follow));
}

try {
  Object.assign(setup, await ask("/api/setup"));
  setup.images = await showStrip();
  for (const [id, list] of [["tokenizer", setup.tokenizers], ["run", setup.runs]]) {
    $(id).replaceChildren(...list.map((one) => new Option(one.name, one.name)));
    $(`choose-${id}`).hidden = list.length < 2;
  }
  const labelled = setup.tokenizers[0].labelled;
  const sorts = setup.sorts.filter((sort) => labelled || !["lift", "purity"].includes(sort));
  const names = { use: "use", lift: "class lift", purity: "class purity", place: "place", number: "number" };
  $("sort").replaceChildren(...sorts.map((sort) => new Option(names[sort], sort)));
  listen();
  render();
} catch (error) {
  tell(error);
}
