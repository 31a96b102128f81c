// The list of all codewords, and a codeword's page.

import { $, link, make, number, percent, place, plural, state, tiles, tokenizerOf, url } from "./base.js";
const WINDOW = 3.6; // side of an exemplar, in patches
const MARGIN = 0.15; // by which it may leave the image, so that the outline is whole

export async function showList(get) {
  const { tokenizer, sort, page } = state;
  const value = await get("/api/codewords", { tokenizer, sort, page });
  const meanings = {
    use: "the number of patches",
    lift: "how many times as frequent a class is among the images with the codeword as among all, where this is no chance",
    purity: `the percentage of patches in the most frequent class, of codewords with ${value.min_patches} patches or more`,
    place: `the percentage of patches at the most frequent place, of codewords with ${value.min_patches} patches or more`,
    number: "the number of the codeword",
  };
  const [share, permuted] = tokenizerOf(tokenizer).position.map(percent);
  $("meaning").textContent = `Below each codeword: ${meanings[sort]}. ${number(value.used)} of ${number(value.total)} are in use. ` +
    `A code contains ${share} of the information about its position in the image, permuted codes ${permuted}.`;
  $("page").textContent = `page ${value.page} of ${value.pages}`;
  $("previous").disabled = value.page <= 1;
  $("next").disabled = value.page >= value.pages;
  const pictures = tiles(value.codewords.map((one) => one.codeword));
  $("list").replaceChildren(...value.codewords.map((one, index) => {
    const text = {
      use: number(one.count), number: number(one.count), lift: one.value ? `${one.value} x ${one.class}` : "none",
      purity: one.value ? `${percent(one.value)} ${one.class}` : "too few", place: one.value ? percent(one.value) : "too few",
    }[sort];
    const title = `Codeword ${one.codeword}: ${plural(one.count, "patch", "patches")}, ${text}`;
    return make("li", {}, link({ codeword: one.codeword, token: null }, { title, dataset: { codeword: one.codeword } },
      pictures[index], make("small", {}, `${one.codeword}`), make("small", {}, text)));
  }));
  showCurrent();
}

export function showCurrent() {
  for (const one of $("list").querySelectorAll("a")) {
    if (one.dataset.codeword === String(state.codeword)) one.setAttribute("aria-current", "true");
    else one.removeAttribute("aria-current");
  }
}

export async function showCodeword(get) {
  const { tokenizer, codeword } = state;
  const value = await get("/api/codeword", { tokenizer, codeword });
  const [tile, ...near] = tiles([value.codeword, ...value.neighbours.map((one) => one.codeword)]);
  const use = value.count
    ? `${plural(value.count, "patch", "patches")} in ${number(value.images)} of ${plural(value.of, "image")}: ` +
      `${percent(value.share)} of all patches, the ${ordinal(value.rank)} most used of ${number(value.used)} in use.`
    : `No patch of the ${plural(value.of, "image")} has this codeword.`;
  $("spoken").textContent = `Codeword ${value.codeword}: ${use}`;
  $("answer").replaceChildren(
    make("div", { className: "head" }, tile, make("div", {}, make("h2", {}, `Codeword ${value.codeword}`), make("p", {}, use))),
    make("div", { className: "columns" },
      make("div", {}, make("h3", {}, exemplarTitle(value)), make("div", { className: "exemplars" }, ...exemplars(value))),
      make("div", { className: "beside" }, ...places(value), ...classes(value),
        make("div", {}, make("h3", {}, "Nearest codewords in use"), make("div", { className: "near" },
          ...value.neighbours.map((one, index) => link({ codeword: one.codeword, token: null },
            { title: plural(one.count, "patch", "patches") }, near[index], `${one.codeword}`)))))));
}

const ordinal = (rank) => `${number(rank)}${["th", "st", "nd", "rd"][rank % 100 >= 11 && rank % 100 <= 13 ? 0 : rank % 10] ?? "th"}`;
const exemplarTitle = (value) => value.exemplars.length < value.count
  ? `${value.exemplars.length} of its patches, drawn at random` : value.count ? "All its patches" : "";

function exemplars(value) {
  const { size, grid: [rows, columns] } = tokenizerOf(state.tokenizer);
  return value.exemplars.map((one) => {
    const high = Math.min(WINDOW, rows), wide = Math.min(WINDOW, columns); // in patches
    const inside = (at, part, whole) => Math.min(Math.max(at + 0.5 - part / 2, -MARGIN), whole - part + MARGIN);
    const top = inside(one.row, high, rows), left = inside(one.column, wide, columns);
    const token = `${one.row},${one.column}`;
    const pixels = make("img", {
      src: url("/picture", { image: one.image, size }), loading: "lazy",
      alt: `patch at ${place(token)} of image ${one.image}${one.class ? `, ${one.class}` : ""}`,
    });
    Object.assign(pixels.style, {
      height: `${(100 * rows) / high}%`, width: `${(100 * columns) / wide}%`,
      top: `${(-100 * top) / high}%`, left: `${(-100 * left) / wide}%`,
    });
    const box = make("i");
    Object.assign(box.style, {
      height: `${100 / high}%`, width: `${100 / wide}%`,
      top: `${(100 * (one.row - top)) / high}%`, left: `${(100 * (one.column - left)) / wide}%`,
    });
    const title = `${one.class || `image ${one.image}`}: open the image`;
    return link({ view: "image", image: one.image, token, codeword: value.codeword }, { className: "window", title }, pixels, box);
  });
}

function places(value) {
  const counts = value.places, most = Math.max(...counts.flat());
  if (!most) return [];
  const canvas = make("canvas", { className: "places", height: counts.length, width: counts[0].length });
  const row = counts.findIndex((line) => line.includes(most)), column = counts[row].indexOf(most);
  const taken = counts.flat().filter(Boolean).length;
  const text = `At ${taken} of ${counts.flat().length} places; most often, ${plural(most, "time")}, at ${place(`${row},${column}`)}.`;
  Object.assign(canvas, { role: "img", ariaLabel: `Map of the places. ${text}` });
  const context = canvas.getContext("2d");
  counts.forEach((line, y) => line.forEach((count, x) => {
    context.fillStyle = `rgba(200, 40, 110, ${count / most})`;
    context.fillRect(x, y, 1, 1);
  }));
  return [make("div", {}, make("h3", {}, "Places in the image"), canvas, make("p", { className: "quiet" }, text))];
}

function classes(value) {
  if (!value.labelled || !value.count) return [];
  const title = make("h3", {}, "Classes");
  if (!value.classes.length) {
    const text = `None of its ${plural(value.classes_seen, "class", "classes")} is evidently more frequent in the images with it than ` +
      `in all (${value.min_images} images or more, p < 0.05 corrected for all classes and codewords).`;
    return [make("div", {}, title, make("p", { className: "quiet" }, text))];
  }
  const head = make("tr", {}, ...["class", "lift"].map((text) => make("th", { scope: "col" }, text)));
  const rows = value.classes.slice(0, 8).map((one) => {
    const counts = `${one.images} of ${plural(one.size, "image")}; ${percent(one.share)} in place of ${percent(one.base)}`;
    return make("tr", {}, make("td", {}, one.name, make("div", { className: "quiet" }, counts)), make("td", {}, one.lift.toFixed(1)));
  });
  const text = `Images of the class that have the codeword; the class's share of the ${plural(value.images, "image")} with it, in place of its share of all.`;
  return [make("div", {}, title, make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows)), make("p", { className: "quiet" }, text))];
}

