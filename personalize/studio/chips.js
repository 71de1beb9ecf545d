// The words of a description as chips: hover or focus shows where a word looks, a click lets it be swapped or weighted.
//
// From Python: props.words [{text, map}].  To Python: props.value {swaps: {word: new}, weights: {word: factor}}, with the
// event `input`.
const find = (selector) => element.querySelector(selector);
const row = find(".wd-row"), panel = find(".wd-edit"), swap = find(".wd-swap"), weight = find(".wd-weight");
const state = { swaps: {}, weights: {}, chosen: null };

function show(word) {
  if (!word) { panel.hidden = true; return; }
  panel.hidden = false;
  find(".wd-word").textContent = word.text;
  find(".wd-map").src = word.map; find(".wd-map").alt = `Orange where “${word.text}” looks`;
  swap.value = state.swaps[word.text] || "";
  weight.value = state.weights[word.text] ?? 1; find("output").textContent = weight.value;
}
function draw() {
  row.replaceChildren(...(props.words || []).map((word) => {
    const chip = document.createElement("button"), changed = state.swaps[word.text] || word.text in state.weights;
    chip.type = "button"; chip.dataset.word = word.text;
    chip.textContent = word.text + (state.swaps[word.text] ? ` → ${state.swaps[word.text]}` : "") +
      (word.text in state.weights ? ` ×${state.weights[word.text]}` : "");
    chip.className = changed ? "wd-changed" : "";
    chip.setAttribute("aria-pressed", state.chosen === word);
    chip.addEventListener("mouseenter", () => show(word));
    chip.addEventListener("focus", () => show(word));
    chip.addEventListener("mouseleave", () => show(state.chosen));
    chip.addEventListener("click", () => { state.chosen = word; mark(); show(word); swap.focus(); });
    return chip;
  }));
  if (!(props.words || []).length) row.innerHTML = "<span>“Read the words” shows where each word of the description looks.</span>";
}
function mark() { row.querySelectorAll("button").forEach((chip) => chip.setAttribute("aria-pressed", chip.dataset.word === state.chosen?.text)); }
function emit() { draw(); props.value = { swaps: state.swaps, weights: state.weights }; trigger("input"); }

swap.addEventListener("change", () => {
  if (!state.chosen) return;
  const text = swap.value.trim();
  if (text) state.swaps[state.chosen.text] = text; else delete state.swaps[state.chosen.text];
  emit();
});
weight.addEventListener("input", () => { find("output").textContent = weight.value; });
weight.addEventListener("change", () => {
  if (!state.chosen) return;
  if (Number(weight.value) === 1) delete state.weights[state.chosen.text]; else state.weights[state.chosen.text] = Number(weight.value);
  emit();
});
find(".wd-back").addEventListener("click", () => {
  if (!state.chosen) return;
  delete state.swaps[state.chosen.text]; delete state.weights[state.chosen.text];
  emit(); show(state.chosen);
});
watch("words", () => { Object.assign(state, { swaps: {}, weights: {}, chosen: null }); show(null); emit(); });
draw();
