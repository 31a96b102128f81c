// Makes each picture of tiles zoomable: wheel, pinch, drag, keys, and colours by what is known of each tile.
"use strict";
const VIRIDIS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
const GREY = "#9a9aa0";

function onScale(share) {
  const at = Math.min(Math.max(share, 0), 1) * (VIRIDIS.length - 1), low = Math.min(Math.floor(at), VIRIDIS.length - 2);
  return `rgb(${VIRIDIS[low].map((value, i) => Math.round(value + (at - low) * (VIRIDIS[low + 1][i] - value)))})`;
}

function element(parent, tag, properties) {
  return parent.appendChild(Object.assign(document.createElement(tag), properties));
}

function show(figure) {
  const data = JSON.parse(figure.querySelector("script").textContent), image = figure.querySelector("img");
  const number = data.codeword.length, columns = data.columns, rows = Math.ceil(number / columns);
  const tools = document.createElement("div"), canvas = document.createElement("canvas");
  const note = document.createElement("output"), pen = canvas.getContext("2d");
  tools.className = "tools";
  image.before(tools, canvas, note);
  figure.classList.add("live");
  const colours = chooser("Frames", ["none", "use", "place", "colour", ...(data.classes.length ? ["class"] : [])]);
  const classes = chooser("Class", ["the most telling of each", ...data.classes]);
  const key = element(tools, "span", { className: "key" });
  for (const [text, label, action] of [["−", "smaller", () => zoom(1 / 1.6)], ["+", "larger", () => zoom(1.6)],
    ["whole", "the whole atlas", reset]])
    element(tools, "button", { type: "button", textContent: text, title: label, ariaLabel: label, onclick: action });
  Object.assign(canvas, { tabIndex: 0, ariaLabel: image.alt + ". Arrow keys choose a codeword, + and - zoom." });
  canvas.setAttribute("role", "application");
  note.ariaLive = "polite";
  let scale = 1, left = 0, top = 0, size = 1, chosen = -1;
  const maxima = { use: Math.log(Math.max(...data.count) + 1), lift: Math.log(Math.max(2, ...data.class.map((c) => c[3] || 1))) };

  function chooser(name, values) {
    const label = element(tools, "label", { textContent: name + " " });
    const select = element(label, "select", { onchange: draw });
    values.forEach((value) => element(select, "option", { textContent: value }));
    return { label, select };
  }

  function frame(cell) {
    const mode = colours.select.value, [row, column] = data.place[cell], [kind, , , lift] = data.class[cell];
    if (mode === "use") return onScale(Math.log(data.count[cell] + 1) / maxima.use);
    if (mode === "colour") return "#" + data.colour[cell];
    if (mode === "place") {
      const right = column / 100; // blue is left and orange right, light is up and dark is down
      return `hsl(${right < 0.5 ? 212 : 32} ${Math.round(160 * Math.abs(right - 0.5)) + 5}% ${Math.round(85 - 0.6 * row)}%)`;
    }
    const wanted = classes.select.selectedIndex - 1;
    if (kind === undefined || lift <= 1 || (wanted >= 0 && kind !== wanted)) return GREY;
    return onScale(Math.log(lift) / maxima.lift);
  }

  function about(cell) {
    const [kind, share, base, lift] = data.class[cell];
    const parts = [`codeword ${data.codeword[cell]}: ${data.count[cell]} patches in ${data.images[cell]} images`];
    if (kind !== undefined) parts.push(`${data.classes[kind]}: ${share}% of these images, ${base}% of all, lift ${lift}`);
    return [...parts, `${data.bound[cell]}% of the patches at one position`].join(" · ");
  }

  function draw() {
    const ratio = window.devicePixelRatio || 1, width = figure.clientWidth, height = Math.round(width * rows / columns);
    if (canvas.width !== Math.round(width * ratio)) {
      canvas.width = width * ratio;
      canvas.height = height * ratio;
      canvas.style.height = height + "px";
    }
    size = width / columns * scale;
    left = Math.min(0, Math.max(left, width - size * columns));
    top = Math.min(0, Math.max(top, height - size * rows));
    canvas.style.touchAction = scale > 1 ? "none" : "pan-y";
    const mode = colours.select.value, tile = image.naturalWidth / columns, inset = mode === "none" ? size / 40 : size / 7;
    classes.label.hidden = mode !== "class";
    key.className = "key " + mode;
    key.textContent = { none: "", use: "rare – frequent", place: "blue left, orange right; light up, dark down",
      colour: "mean colour", class: "lift 1 – " + Math.exp(maxima.lift).toFixed(1) + ", grey: none" }[mode];
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    pen.imageSmoothingEnabled = size * ratio < tile;
    pen.font = "11px system-ui, sans-serif";
    for (let cell = 0; cell < number; cell++) {
      const x = left + cell % columns * size, y = top + Math.floor(cell / columns) * size;
      if (x + size < 0 || y + size < 0 || x > width || y > height) continue;
      if (mode !== "none") {
        pen.fillStyle = frame(cell);
        pen.fillRect(x + size / 40, y + size / 40, size * 0.95, size * 0.95);
      }
      pen.drawImage(image, cell % columns * tile, Math.floor(cell / columns) * tile, tile, tile,
        x + inset, y + inset, size - 2 * inset, size - 2 * inset);
      if (size >= 64) label(mode === "class" && data.class[cell].length ? data.classes[data.class[cell][0]] : data.codeword[cell], x, y);
    }
    if (chosen >= 0)
      for (const [colour, line] of [["#000", 4], ["#fff", 2]]) {
        Object.assign(pen, { strokeStyle: colour, lineWidth: line });
        pen.strokeRect(left + chosen % columns * size, top + Math.floor(chosen / columns) * size, size, size);
      }
  }

  function label(text, x, y) {
    const shown = String(text).slice(0, Math.floor(size / 7)), width = pen.measureText(shown).width;
    pen.fillStyle = "#000b";
    pen.fillRect(x + size / 40, y + size * 0.975 - 15, width + 6, 15);
    pen.fillStyle = "#fff";
    pen.fillText(shown, x + size / 40 + 3, y + size * 0.975 - 4);
  }

  function choose(cell) {
    if (cell < 0 || cell >= number || cell === chosen) return;
    chosen = cell;
    note.textContent = about(cell);
    draw();
  }

  function cellAt(event) {
    const box = canvas.getBoundingClientRect(), column = Math.floor((event.clientX - box.left - left) / size);
    return column < 0 || column >= columns ? -1 : Math.floor((event.clientY - box.top - top) / size) * columns + column;
  }

  function zoom(factor, event) {
    const box = canvas.getBoundingClientRect(), next = Math.min(Math.max(scale * factor, 1), Math.max(columns / 3, 1));
    const x = event ? event.clientX - box.left : box.width / 2, y = event ? event.clientY - box.top : box.height / 2;
    left = x - (x - left) * next / scale;
    top = y - (y - top) * next / scale;
    scale = next;
    draw();
  }

  function reset() {
    scale = 1;
    draw();
  }

  const touched = new Map();
  const apart = () => { const [a, b] = [...touched.values()]; return Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY); };
  canvas.onpointerdown = (event) => {
    touched.set(event.pointerId, event);
    canvas.setPointerCapture(event.pointerId);
    choose(cellAt(event));
  };
  canvas.onpointermove = (event) => {
    const before = touched.get(event.pointerId);
    if (!before) { if (event.pointerType === "mouse") choose(cellAt(event)); return; }
    const distance = touched.size === 2 ? apart() : 0;
    touched.set(event.pointerId, event);
    if (touched.size === 2) zoom(apart() / distance, event);
    left += event.clientX - before.clientX;
    top += event.clientY - before.clientY;
    draw();
  };
  canvas.onpointerup = canvas.onpointercancel = (event) => touched.delete(event.pointerId);
  canvas.ondblclick = (event) => zoom(2, event);
  canvas.onwheel = (event) => { // the page scrolls until the atlas has been clicked
    if (!event.ctrlKey && document.activeElement !== canvas) return;
    event.preventDefault();
    zoom(Math.exp(-event.deltaY / 300), event);
  };
  canvas.onkeydown = (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
    if (step) choose(Math.max(chosen, 0) + step);
    else if (event.key === "+") zoom(1.6);
    else if (event.key === "-") zoom(1 / 1.6);
    else if (event.key === "0") reset();
    else return;
    event.preventDefault();
  };
  new ResizeObserver(draw).observe(figure);
  image.decode().then(draw);
}

document.querySelectorAll("figure.atlas").forEach(show);
