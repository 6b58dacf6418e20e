// The page of an HTTP service: it calls the same API as any client.
const $ = (id) => document.getElementById(id);
const form = $("form");
const cards = new Map(); // by video id
const models = new Map();
let key = sessionStorage.getItem("key");
let oldest = null;
const MOST_STREAMS = 3; // of the six connections that a browser opens to one host
let streaming = 0;

async function api(path, options = {}) {
  const headers = { ...(options.headers ?? {}), ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  const answer = await fetch(path, { ...options, headers });
  if (answer.status === 401) {
    await askKey(key ? "That key is not valid." : "");
    return api(path, options);
  }
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => null);
  const error = new Error(body?.error?.message ?? `The service answered ${answer.status}.`);
  error.param = body?.error?.param;
  throw error;
}

function askKey(problem) {
  $("key-error").textContent = problem;
  $("key-error").hidden = !problem;
  if (!$("key-dialog").open) $("key-dialog").showModal();
  return new Promise((resolve) => {
    $("key-dialog").addEventListener("close", () => {
      key = $("key").value.trim();
      sessionStorage.setItem("key", key);
      $("change-key").hidden = false;
      resolve();
    }, { once: true });
  });
}

async function loadModels() {
  const { data } = await (await api("/v1/models")).json();
  for (const model of data) {
    models.set(model.id, model);
    $("model").append(new Option(model.id, model.id));
  }
  $("model-choice").hidden = data.length < 2;
  showModel();
}

function showModel() {
  const model = models.get($("model").value);
  for (const name of ["width", "height", "num_frames", "num_inference_steps", "guidance_scale"]) {
    form.elements[name].placeholder = model.files.length && ["width", "height"].includes(name) ? "auto" : model.defaults[name];
  }
  for (const name of ["width", "height"]) form.elements[name].min = form.elements[name].step = model.multiple;
  form.elements.num_frames.max = model.limits.max_frames;
  form.elements.num_inference_steps.max = model.limits.max_steps;
  $("frames").hidden = model.makes === "image";
  $("first-name").textContent = model.makes === "image" ? "Image" : "First frame";
  $("images").hidden = !model.files.length;
  for (const drop of document.querySelectorAll(".drop")) drop.hidden = !model.files.includes(drop.querySelector("input").name);
}

function showError(message, param = null) {
  $("error").textContent = message;
  $("error").hidden = !message;
  for (const field of form.querySelectorAll("[aria-invalid]")) {
    for (const name of ["aria-invalid", "aria-describedby"]) field.removeAttribute(name);
  }
  const field = param && form.elements[param === "size" ? "width" : param];
  if (!field) return;
  field.setAttribute("aria-invalid", "true");
  field.setAttribute("aria-describedby", "error");
  field.focus();
}

async function submit() {
  const data = new FormData();
  const get = (name) => form.elements[name].value;
  data.set("model", $("model").value);
  data.set("prompt", get("prompt"));
  for (const name of ["negative_prompt", "num_frames", "num_inference_steps", "guidance_scale", "seed"]) {
    if (get(name) !== "" && !(name === "num_frames" && $("frames").hidden)) data.set(name, get(name));
  }
  const defaults = models.get($("model").value).defaults;
  if (get("width") || get("height")) data.set("size", `${get("width") || defaults.width}x${get("height") || defaults.height}`);
  for (const name of models.get($("model").value).files) for (const file of form.elements[name].files) data.append(name, file);
  showError("");
  $("submit").disabled = true;
  try {
    show(await (await api("/v1/videos", { method: "POST", body: data })).json(), true);
  } catch (error) {
    showError(error.message, error.param);
  } finally {
    $("submit").disabled = false;
  }
}

function show(video, first = false) {
  let card = cards.get(video.id);
  if (!card) {
    card = $("card").content.firstElementChild.cloneNode(true);
    card.dataset.id = video.id;
    card.querySelector(".prompt").id = `prompt-${video.id}`; // tells one card's buttons from another's
    for (const each of card.querySelectorAll("video, .made, .actions > *")) each.setAttribute("aria-describedby", `prompt-${video.id}`);
    card.querySelector(".cancel").addEventListener("click", () => act(video.id, "cancel"));
    card.querySelector(".delete").addEventListener("click", () => act(video.id, "delete"));
    card.querySelector(".again").addEventListener("click", () => again(card.video));
    $("gallery")[first ? "prepend" : "append"](card);
    cards.set(video.id, card);
  }
  if (card.video && card.video.status !== video.status) announce(video);
  card.video = video;
  card.dataset.status = video.status;
  const [width, height] = video.size.split("x");
  card.style.setProperty("--aspect", `${width} / ${height}`);
  card.querySelector(".prompt").textContent = video.prompt;
  const s = video.settings;
  const frames = video.object === "image" ? "" : ` · ${s.num_frames} frames`;
  const guidance = s.guidance_scale_2 === null ? s.guidance_scale : `${s.guidance_scale} / ${s.guidance_scale_2}`;
  card.querySelector(".settings").textContent =
    `${video.model} · ${video.size}${frames} · ${s.num_inference_steps} steps · guidance ${guidance} · seed ${s.seed}`;
  const running = ["queued", "in_progress", "cancelling"].includes(video.status);
  card.querySelector(".cancel").hidden = !running;
  card.querySelector(".cancel").disabled = video.status === "cancelling";
  showNote(card, video);
  showStages(card, running ? video.stages : []);
  $("empty").hidden = cards.size > 0;
  if (running && !card.following) follow(card);
  if (video.status === "completed" && !card.loaded) nearby.observe(card);
}

function announce(video) {
  const words = { in_progress: "is being made", completed: "is ready", failed: "failed", cancelled: "was cancelled" };
  if (words[video.status]) $("news").textContent = `${video.prompt}: the ${video.object} ${words[video.status]}.`;
}

function showNote(card, video) {
  const words = { queued: "waits", in_progress: `${video.progress} %`, cancelling: "is cancelled", cancelled: "cancelled", failed: "failed", completed: "" };
  card.querySelector(".status").textContent = words[video.status];
  const note = card.querySelector(".note");
  const parts = [];
  if (video.queue_position !== null) parts.push(video.queue_position ? `${video.queue_position} before it` : "next in the queue");
  if (video.wait_s !== null) parts.push(`about ${seconds(video.wait_s)} left`);
  note.textContent = video.error ? video.error.message : parts.join(", ");
  note.hidden = !note.textContent;
  note.classList.toggle("bad", video.error !== null);
}

function seconds(number) {
  return number < 90 ? `${Math.max(1, Math.round(number))} s` : `${Math.round(number / 60)} min`;
}

function showStages(card, stages) {
  card.querySelector(".stages").replaceChildren(...stages.map((stage) => {
    const row = document.createElement("div");
    row.className = "stage";
    row.dataset.state = stage.state;
    const name = document.createElement("span");
    const bar = document.createElement("progress");
    const state = document.createElement("span");
    const done = stage.state === "done" || stage.state === "publishing";
    name.textContent = stage.stage;
    bar.max = stage.steps || 1;
    bar.value = done ? bar.max : stage.step;
    if (!stage.steps && stage.state === "running") bar.removeAttribute("value");
    bar.setAttribute("aria-label", `${stage.stage} ${stage.state}`);
    state.textContent = done ? "done" : stage.steps ? `${stage.step}/${stage.steps}` : stage.state;
    row.append(name, bar, state);
    return row;
  }));
}

async function follow(card) {
  card.following = true;
  while (card.isConnected && ["queued", "in_progress", "cancelling"].includes(card.video.status)) {
    if (streaming < MOST_STREAMS) await stream(card);
    if (!card.isConnected) return;
    await new Promise((resolve) => setTimeout(resolve, 1000)); // the service may be starting again
    try {
      show(await (await api(`/v1/videos/${card.dataset.id}`)).json());
    } catch { /* it is asked again above */ }
  }
  card.following = false;
}

async function stream(card) {
  streaming += 1;
  try {
    const answer = await api(`/v1/videos/${card.dataset.id}/events`);
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      const events = (text + part.value).split("\n\n");
      text = events.pop();
      for (const event of events) {
        const data = event.split("\n").find((line) => line.startsWith("data: "));
        if (data) show(JSON.parse(data.slice(6)));
      }
    }
  } catch { /* the job is asked for instead */
  } finally {
    streaming -= 1;
  }
}

const nearby = new IntersectionObserver((entries) => { // what is far down is not fetched
  for (const { isIntersecting, target } of entries) {
    if (isIntersecting && !target.loaded) load(target);
  }
}, { rootMargin: "300px" });

async function load(card) {
  card.loaded = true;
  nearby.unobserve(card);
  const shown = card.querySelector(card.video.object === "image" ? ".made" : "video");
  try {
    const content = await (await api(`/v1/videos/${card.dataset.id}/content`)).blob();
    const url = URL.createObjectURL(content);
    shown.src = url;
    shown.hidden = false;
    card.querySelector(".placeholder").hidden = true;
    const link = card.querySelector(".download");
    link.href = url;
    link.download = `${card.dataset.id}.${card.video.settings.format}`;
    link.hidden = false;
    if (card.following && card.video.object === "video") shown.play().catch(() => {});
  } catch (error) {
    card.querySelector(".status").textContent = error.message.replace("video_id: ", "");
  }
}

async function act(id, what) {
  const card = cards.get(id);
  try {
    if (what === "cancel") {
      show(await (await api(`/v1/videos/${id}/cancel`, { method: "POST" })).json());
    } else {
      await api(`/v1/videos/${id}`, { method: "DELETE" });
      URL.revokeObjectURL(card.querySelector(".download").href);
      cards.delete(id);
      const next = (card.nextElementSibling ?? card.previousElementSibling)?.querySelector(".delete");
      card.remove();
      (next ?? form.elements.prompt).focus();
      $("news").textContent = `The ${card.video.object} was deleted.`;
      $("empty").hidden = cards.size > 0;
    }
  } catch (error) {
    Object.assign(card.querySelector(".note"), { textContent: error.message, hidden: false });
  }
}

function again(video) {
  const [width, height] = video.size.split("x");
  const values = { prompt: video.prompt, width, height, ...video.settings };
  for (const name of ["prompt", "negative_prompt", "width", "height", "num_frames", "num_inference_steps", "guidance_scale", "seed"]) {
    form.elements[name].value = values[name] ?? "";
  }
  if (models.has(video.model)) $("model").value = video.model;
  showModel();
  form.elements.prompt.focus();
  form.scrollIntoView({ behavior: "smooth" });
}

async function loadPage() {
  const after = oldest ? `&after=${oldest}` : "";
  const { data, last_id, has_more } = await (await api(`/v1/videos?limit=12${after}`)).json();
  for (const video of data) show(video);
  oldest = last_id ?? oldest;
  $("more").hidden = !has_more;
  $("empty").hidden = cards.size > 0;
}

for (const drop of document.querySelectorAll(".drop")) {
  const input = drop.querySelector("input");
  const choose = () => {
    const file = input.files[0];
    drop.classList.toggle("chosen", Boolean(file));
    drop.style.backgroundImage = file && file.type.startsWith("image/") ? `url(${URL.createObjectURL(file)})` : "";
  };
  input.addEventListener("change", choose);
  for (const event of ["dragover", "dragleave", "drop"]) {
    drop.addEventListener(event, (given) => {
      given.preventDefault();
      drop.classList.toggle("over", event === "dragover");
      if (event === "drop" && given.dataTransfer.files.length) {
        input.files = given.dataTransfer.files;
        choose();
      }
    });
  }
}
form.addEventListener("submit", (event) => { event.preventDefault(); loaded.then(submit, () => {}); });
form.elements.prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});
$("model").addEventListener("change", showModel);
$("more").addEventListener("click", () => loadPage().catch((error) => showError(error.message)));
$("change-key").addEventListener("click", async () => { await askKey(""); location.reload(); });
$("change-key").hidden = !key;
const loaded = loadModels();
loaded.then(loadPage).catch((error) => showError(error.message));
