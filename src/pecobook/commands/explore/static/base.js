// The address of the page, requests to the server, and elements.
//
// Everything that the page shows follows from its address, so that addresses can be shared and the back button works: `go`
// changes the address, and the page then brings each of its parts up to date with `state`.

export const $ = (id) => document.getElementById(id);
export const VIEWS = { image: "Image", codewords: "All codewords", mask: "Masked prediction" };
export const setup = {}; // what does not change while the server runs
export const state = {}; // the address

export const tokenizerOf = (name) => setup.tokenizers.find((one) => one.name === name);
export const runOf = (name) => setup.runs.find((one) => one.name === name);

// --------------------------------------------------------------------------------------------------------- the address

// Sets the state that the address names, with defaults.
export function read() {
  const given = Object.fromEntries(new URLSearchParams(location.search));
  const named = (list, name) => list.find((one) => one.name === name) ?? list[0];
  const next = { view: "image", sort: "use", page: "1", ...given };
  if (!(next.view in VIEWS) || (next.view === "mask" && !setup.runs.length)) next.view = "image";
  next.tokenizer = named(setup.tokenizers, given.tokenizer).name;
  next.image ??= setup.images[0].image;
  if (setup.runs.length) next.run = named(setup.runs, given.run).name;
  for (const key of Object.keys(state)) delete state[key];
  Object.assign(state, next);
}

const KEYS = ["view", "tokenizer", "codeword", "image", "token", "sort", "page", "other", "run", "mask"];

function address(changes) {
  const next = { ...state, ...changes };
  const shown = {
    sort: next.view === "codewords", page: next.view === "codewords", run: next.view === "mask",
    mask: next.view === "mask", other: next.view === "image",
  };
  const kept = KEYS.filter((key) => next[key] != null && next[key] !== "" && (shown[key] ?? true));
  return `?${new URLSearchParams(kept.map((key) => [key, next[key]]))}`.replaceAll("%2C", ",");
}

export function go(changes, { replace = false, follow = false } = {}) {
  history[replace ? "replaceState" : "pushState"](null, "", address(changes));
  dispatchEvent(new CustomEvent("address", { detail: { follow } }));
}

// ------------------------------------------------------------------------------------------------------------- requests

export async function ask(path, query = {}, options = {}) {
  let answer;
  try {
    answer = await fetch(`${path}?${new URLSearchParams(query)}`, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The explorer does not answer. Is the command still running?");
  }
  const value = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(value.error ?? `The explorer answered with the error ${answer.status}.`);
  return value;
}

export const url = (path, query) => `${path}?${new URLSearchParams({ ...query, s: setup.session })}`;

export function tell(error) {
  $("message").textContent = error?.message ?? "";
  $("message").hidden = !error;
}

export const parts = {}; // name -> what it shows, and how to stop the request for it

// Brings a part of the page up to date if its key changed. An answer that comes too late is thrown away.
export async function update(name, key, work, clear) {
  if (parts[name]?.key === key) return;
  parts[name]?.controller.abort();
  const controller = new AbortController();
  parts[name] = { key, controller };
  clear?.();
  try {
    await work((path, query) => ask(path, query, { signal: controller.signal }));
  } catch (error) {
    if (error.name === "AbortError") return;
    parts[name] = undefined; // the next change of the address tries again
    tell(error);
  }
}

// ------------------------------------------------------------------------------------------------------------- elements

export function make(tag, properties = {}, ...children) {
  const { dataset, ...own } = properties;
  const element = Object.assign(document.createElement(tag), own);
  Object.assign(element.dataset, dataset);
  element.append(...children);
  return element;
}

// A link to another state of the page, which also opens in a new tab.
export function link(changes, properties, ...children) {
  const element = make("a", { href: address(changes), ...properties }, ...children);
  element.addEventListener("click", (event) => {
    if (event.button || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    go(changes, { follow: true });
  });
  return element;
}

// A tile for each codeword, its decoded patch beside an example, with one request for each 20.
export function tiles(codewords, tokenizer = state.tokenizer) {
  return codewords.map((codeword, place) => {
    const first = place - (place % 20), strip = codewords.slice(first, first + 20);
    const label = `decoded patch of codeword ${codeword}, and an example`;
    const tile = make("span", { className: "tile", role: "img", ariaLabel: label });
    const address = url("/tiles", { tokenizer, codewords: strip.join(",") });
    tile.style.backgroundImage = `url("${address}")`;
    tile.style.backgroundSize = `${100 * strip.length}% 100%`;
    tile.style.backgroundPosition = `${(100 * (place % 20)) / Math.max(strip.length - 1, 1)}% 0`;
    return tile;
  });
}

// A grid of buttons over a picture, one for each patch; arrow keys move, Enter and space choose.
export function grid(frame, [rows, columns], label, describe, choose) {
  const cells = [];
  const element = make("div", { className: "grid", role: "grid", ariaLabel: label });
  for (let row = 0; row < rows; row++) {
    const line = make("div", { role: "row" });
    for (let column = 0; column < columns; column++) {
      const cell = make("button", { type: "button", role: "gridcell", tabIndex: cells.length ? -1 : 0 });
      cell.dataset.token = `${row},${column}`;
      cell.ariaLabel = describe(row, column);
      cells.push(cell);
      line.append(cell);
    }
    element.append(line);
  }
  const focus = (place) => {
    for (const cell of cells) cell.tabIndex = -1;
    cells[place].tabIndex = 0;
    cells[place].focus({ preventScroll: true });
  };
  element.addEventListener("keydown", (event) => {
    const place = cells.indexOf(document.activeElement), column = place % columns;
    const to = {
      ArrowLeft: column ? place - 1 : place, ArrowRight: column < columns - 1 ? place + 1 : place,
      ArrowUp: place - columns, ArrowDown: place + columns, Home: place - column, End: place - column + columns - 1,
    }[event.key];
    if (to === undefined || place < 0) return;
    event.preventDefault();
    if (cells[to]) focus(to);
  });
  element.addEventListener("click", (event) => choose?.(event.target.dataset.token));
  frame.querySelector(".grid")?.remove();
  frame.append(element);
  return cells;
}

export function mark(frame, token, [rows, columns]) {
  frame.querySelector(".mark")?.remove();
  if (!token) return;
  const [row, column] = token.split(",").map(Number), element = make("div", { className: "mark" });
  Object.assign(element.style, {
    top: `${(100 * row) / rows}%`, left: `${(100 * column) / columns}%`, height: `${100 / rows}%`, width: `${100 / columns}%`,
  });
  frame.append(element);
}

export function picture(frame, source, alt) {
  frame.querySelector("img")?.remove();
  frame.prepend(make("img", { src: source, alt }));
}

export const place = (token) => { const [row, column] = token.split(",").map(Number); return `row ${row + 1}, column ${column + 1}`; };
export const number = (value) => value.toLocaleString("en");
export const percent = (value) => `${value === 0 || value >= 10 ? value.toFixed(0) : value < 1 ? +value.toPrecision(1) : value.toFixed(1)}%`;
export const plural = (count, word, words = `${word}s`) => `${number(count)} ${count === 1 ? word : words}`;

