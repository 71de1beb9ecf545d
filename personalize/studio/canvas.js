// A picture on which points are set and masks are painted.  Points are in pixels of the picture.
//
// From Python: props.picture {url, name}, props.found (a mask, white on black, as a data URL), props.given {points, mark},
// props.layers (names of the masks).  To Python: props.value {points, masks, sent}, with the events `input` (points or a
// mask have changed) and `upload` (a file was sent).  The tools are an attribute of the template, for an update before the
// component is mounted replaces all props; the event `load` asks for what it has missed.
const find = (selector) => element.querySelector(selector);
const canvas = find("canvas"), stage = find(".pz-stage"), line = find(".pz-line");
const TOOLS = find(".pz").dataset.tools.split(" ");
const COLOURS = ["#f5b700", "#2f9e8f", "#c2557a", "#5b7fd6"];
const state = { image: null, url: "", points: [], masks: [], names: [], found: null, layer: 0, tool: "", brush: 5, cursor: null, undo: [], held: null };
const layers = () => (props.layers && props.layers.length ? props.layers : ["mask"]);
function maskOf(k) {  // the mask painted under the name of layer k; or at its place, if that one was only renamed
  const names = layers(), was = state.names.indexOf(names[k]);
  return state.masks[was >= 0 ? was : names.includes(state.names[k]) ? -1 : k];
}
const say = (text) => { line.textContent = text; };

function blank() {
  const one = document.createElement("canvas");
  one.width = state.image.naturalWidth; one.height = state.image.naturalHeight;
  return one;
}
function tinted(image, colour) {  // white on black → colour on nothing
  const one = blank(), pen = one.getContext("2d", { willReadFrequently: true });
  pen.drawImage(image, 0, 0, one.width, one.height);
  const data = pen.getImageData(0, 0, one.width, one.height), rgb = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
  for (let i = 0; i < data.data.length; i += 4) {
    data.data[i + 3] = data.data[i] > 127 ? 255 : 0;
    for (let k = 0; k < 3; k++) data.data[i + k] = rgb[k];
  }
  pen.putImageData(data, 0, 0);
  return one;
}
function exported(mask) {  // colour on nothing → white on black
  if (!mask) return null;
  const one = blank(), pen = one.getContext("2d");
  pen.drawImage(mask, 0, 0);
  pen.globalCompositeOperation = "source-in"; pen.fillStyle = "#fff"; pen.fillRect(0, 0, one.width, one.height);
  pen.globalCompositeOperation = "destination-over"; pen.fillStyle = "#000"; pen.fillRect(0, 0, one.width, one.height);
  return one.toDataURL("image/png");
}
function copied(mask) {
  if (!mask) return null;
  const one = blank(); one.getContext("2d").drawImage(mask, 0, 0); return one;
}
function remember() {
  state.undo.push({ points: state.points.map((p) => [...p]), masks: state.masks.map(copied), names: state.names });
  if (state.undo.length > 20) state.undo.shift();
}
function tell(more = {}) {
  props.value = { points: state.points, masks: layers().map((_, k) => exported(maskOf(k))), picture: state.url, ...more };
}
function emit(event = "input", more = {}) { tell(more); trigger(event); }

function scale() { return state.image ? canvas.width / state.image.naturalWidth : 1; }
function draw() {
  if (!state.image) return;
  const width = stage.clientWidth, most = Math.max(220, Math.min(innerHeight * 0.62, 620)), ratio = devicePixelRatio || 1;
  const shown = Math.min(width, most * state.image.naturalWidth / state.image.naturalHeight);
  const height = shown * state.image.naturalHeight / state.image.naturalWidth;
  canvas.style.width = shown + "px"; canvas.style.height = height + "px";
  canvas.width = Math.round(shown * ratio); canvas.height = Math.round(height * ratio);
  const pen = canvas.getContext("2d"), s = scale();
  pen.drawImage(state.image, 0, 0, canvas.width, canvas.height);
  pen.globalAlpha = 0.5;
  layers().forEach((_, k) => {
    const mask = maskOf(k) || (k === 0 ? state.found : null);
    if (mask) pen.drawImage(mask, 0, 0, canvas.width, canvas.height);
  });
  pen.globalAlpha = 1;
  drawPoints(pen, s, ratio);
  if (state.cursor && document.activeElement === canvas) drawCursor(pen, s, ratio);
}
function drawPoints(pen, s, ratio) {
  const r = 7 * ratio, at = (p) => [(p[0] + 0.5) * s, (p[1] + 0.5) * s];
  for (let i = 0; i < state.points.length; i += 2) {
    const from = at(state.points[i]), to = state.points[i + 1] && at(state.points[i + 1]);
    if (to) {
      for (const [colour, w] of [["#000a", 5], ["#fff", 2.5]]) {
        pen.strokeStyle = colour; pen.lineWidth = w * ratio;
        pen.beginPath(); pen.moveTo(...from); pen.lineTo(...to); pen.stroke();
      }
    }
    for (const [p, colour] of [[from, "#e63946"], [to, "#1d78f0"]]) {
      if (!p) continue;
      pen.beginPath(); pen.arc(p[0], p[1], r, 0, 7); pen.fillStyle = colour; pen.fill();
      pen.lineWidth = 2 * ratio; pen.strokeStyle = "#fff"; pen.stroke();
    }
  }
}
function drawCursor(pen, s, ratio) {
  const [x, y] = [(state.cursor[0] + 0.5) * s, (state.cursor[1] + 0.5) * s];
  const r = state.tool === "point" ? 10 * ratio : radius() * s;
  for (const [colour, w] of [["#000a", 3], ["#fff", 1.5]]) {
    pen.strokeStyle = colour; pen.lineWidth = w * ratio;
    pen.beginPath(); pen.arc(x, y, r, 0, 7); pen.stroke();
  }
}

function radius() { return Math.max(1, state.brush / 100 * Math.max(state.image.naturalWidth, state.image.naturalHeight)); }
function place(event) {
  const box = canvas.getBoundingClientRect(), s = state.image.naturalWidth / box.width;
  const clamp = (v, most) => Math.min(most - 1, Math.max(0, v));
  return [clamp((event.clientX - box.left) * s, state.image.naturalWidth), clamp((event.clientY - box.top) * s, state.image.naturalHeight)];
}
const rounded = (p) => p.map((v) => Math.floor(v));
function stroke(from, to) {
  state.masks = layers().map((_, k) => maskOf(k)); state.names = [...layers()];
  if (!state.masks[state.layer]) state.masks[state.layer] = state.layer === 0 && state.found ? copied(state.found) : blank();
  const pen = state.masks[state.layer].getContext("2d");
  pen.globalCompositeOperation = state.tool === "erase" ? "destination-out" : "source-over";
  pen.strokeStyle = COLOURS[state.layer % 4]; pen.lineWidth = 2 * radius(); pen.lineCap = pen.lineJoin = "round";
  pen.beginPath(); pen.moveTo(...from); pen.lineTo(to[0] + 0.01, to[1]); pen.stroke();
}
function setPoint(p) {
  remember(); state.points.push(rounded(p)); state.held = state.points.length - 1;
  say(state.points.length % 2 ? "Now click where it is to go." : "");
}

canvas.addEventListener("pointerdown", (event) => {
  if (!state.image || event.button !== 0 || !event.isPrimary) return;  // the right button opens the browser's menu
  event.preventDefault(); canvas.focus({ preventScroll: true }); canvas.setPointerCapture(event.pointerId);
  const p = place(event);
  if (state.tool !== "point") { remember(); stroke(p, p); state.held = p; draw(); return; }
  const reach = 12 * state.image.naturalWidth / canvas.getBoundingClientRect().width;
  const near = state.points.findIndex((q) => Math.hypot(q[0] - p[0], q[1] - p[1]) < reach);
  if (near >= 0) { remember(); state.held = near; } else setPoint(p);
  draw();
});
canvas.addEventListener("pointermove", (event) => {
  if (!state.image || !event.isPrimary) return;
  const p = place(event);
  state.cursor = p;
  if (state.held !== null) {
    if (state.tool === "point") state.points[state.held] = rounded(p); else { stroke(state.held, p); state.held = p; }
  }
  draw();
});
function release() { if (state.held !== null) { state.held = null; emit(); draw(); } }
for (const end of ["pointerup", "pointercancel", "lostpointercapture"]) canvas.addEventListener(end, release);
canvas.addEventListener("keydown", (event) => {
  if (!state.image) return;
  const step = event.shiftKey ? 1 : Math.max(1, state.image.naturalWidth / 64);
  const way = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] }[event.key];
  const size = [state.image.naturalWidth, state.image.naturalHeight];
  state.cursor = state.cursor || size.map((v) => v / 2);
  if (way) state.cursor = state.cursor.map((v, k) => Math.min(size[k] - 1, Math.max(0, v + way[k])));
  else if (event.key === "Enter" || event.key === " ") {
    if (state.tool === "point") { setPoint(state.cursor); state.held = null; } else { remember(); stroke(state.cursor, state.cursor); }
    emit();
  } else return;
  event.preventDefault(); say(`${rounded(state.cursor).join(", ")}`); draw();
});
canvas.addEventListener("focus", draw); canvas.addEventListener("blur", draw);

function choose(tool) {
  state.tool = tool;
  element.querySelectorAll("[data-tool]").forEach((b) => b.setAttribute("aria-pressed", b.dataset.tool === tool));
  find(".pz-brush").hidden = tool === "point";
  say({ point: "Click what is to move, then where it is to go.", paint: "Paint over what is meant.", erase: "Erase what is not meant." }[tool]);
  draw();
}
element.querySelectorAll("[data-tool]").forEach((button) => {
  const wanted = button.dataset.tool === "point" ? "point" : "paint";
  button.hidden = !TOOLS.includes(wanted);
  button.addEventListener("click", () => choose(button.dataset.tool));
});
find(".pz-brush input").addEventListener("input", (event) => { state.brush = Number(event.target.value); draw(); });
find(".pz-undo").addEventListener("click", () => {
  const last = state.undo.pop();
  if (last) { state.points = last.points; state.masks = last.masks; state.names = last.names; draw(); emit(); }
});
find(".pz-clear").addEventListener("click", () => {
  if (!state.image) return;
  remember(); state.points = []; state.masks = []; state.found = null; draw(); emit();
});
const chooser = find(".pz-layer");
chooser.addEventListener("change", () => { state.layer = Number(chooser.value); choose("paint"); });
function listLayers() {
  chooser.replaceChildren(...layers().map((name, k) => new Option(name, k)));
  chooser.hidden = layers().length < 2;
  state.layer = Math.min(state.layer, layers().length - 1); chooser.value = state.layer; draw();
  if (state.masks.some(Boolean)) tell();
}

async function send(files) {
  const sent = [];
  try {
    for (const file of files) {
      if (file.size > 500e6) throw new Error(`${file.name} has ${Math.round(file.size / 1e6)} MB, a file may have 500: make it smaller first`);
      say(`Sending ${file.name} …`);
      sent.push((await upload(file)).path);
    }
    say("");
    if (sent.length) emit("upload", { sent });
  } catch (error) { say(`Not taken: ${error.message || error}`); }
}
const file = find("input[type=file]");
file.multiple = find(".pz").dataset.many === "true";
find(".pz-open").addEventListener("click", () => file.click());
find(".pz-empty").addEventListener("click", () => file.click());
file.addEventListener("change", () => { send([...file.files]); file.value = ""; });
stage.addEventListener("dragover", (event) => { event.preventDefault(); stage.classList.add("pz-over"); });
stage.addEventListener("dragleave", () => stage.classList.remove("pz-over"));
stage.addEventListener("drop", (event) => { event.preventDefault(); stage.classList.remove("pz-over"); send([...event.dataTransfer.files]); });

function show() {
  const picture = props.picture;
  if (!picture || picture.url === state.url) return;
  const image = new Image();
  image.onload = () => {
    if (!props.picture || props.picture.url !== picture.url) return;  // another was chosen while this one was loading
    const another = state.url !== "";
    Object.assign(state, { image, url: picture.url, points: [], masks: [], found: null, undo: [], cursor: null });
    find(".pz").classList.add("pz-full");
    canvas.setAttribute("aria-label", `${picture.name}, ${image.naturalWidth} by ${image.naturalHeight} pixels. ` +
      "Arrow keys move, Enter sets a point or paints.");
    choose(state.tool); give(); draw();
    if (another) emit(); else props.value = {};  // what was drawn on the picture before is not sent with this one
  };
  image.onerror = () => say(`${picture.name} cannot be shown by this browser`);
  image.src = picture.url;
}
function find_mask() {
  if (!state.image || !props.found) { state.found = null; draw(); return; }
  const image = new Image();
  const found = image.src = props.found, shown = state.image;
  image.onload = () => {
    if (found !== props.found || shown !== state.image) return;  // of points or of a picture that are no more
    state.found = tinted(image, COLOURS[0]); draw();
  };
}
function give() {
  if (props.given && state.image && props.given.picture === state.url) { state.points = props.given.points; draw(); }
}
watch("picture", show); watch("found", find_mask); watch("given", give); watch("layers", listLayers);
new ResizeObserver(draw).observe(stage);
listLayers(); choose(TOOLS[0]); show(); trigger("load");
