// What the page says, in two languages, and how it writes numbers. The browser's language decides, or the person.

const WORDS = {
  en: {
    skip: "Skip to the content", options: "Options", language: "Language", docs: "API",
    themeAuto: "Colours: as the system", themeLight: "Colours: light", themeDark: "Colours: dark",
    live: "live", lost: "connection lost, trying again", connecting: "connecting",
    network: "Network", thisPeer: "This peer", learning: "Learning", ask: "Ask the model", models: "Models", peers: "Peers",
    alone: "No other peer yet. Let one join: gossipml token new",
    sum: "{connected} of {known} peers connected", more: "and {n} more in the table",
    you: "this peer",
    accuracy: "Accuracy", loss: "Training loss", lossLog: "Training loss, by powers of ten", round: "Round", age: "Samples behind the model", sent: "Sent", received: "Received",
    neighbours: "Neighbours", uptime: "Running for", model: "Model", state: "State", name: "Name", seen: "Last heard",
    address: "Address", problem: "Remark", now: "now", ago: "{t} ago", data: "Data",
    states: {
      starting: "starting", training: "training", paused: "paused", averaging: "averaging", serving: "serving",
      stopped: "stopped", connected: "connected", suspect: "silent", lost: "lost", refused: "refused",
      quarantined: "quarantined", known: "known",
    },
    testData: "accuracy on the test data", noPoints: "Nothing measured yet.",
    chartSum: "{what}: {now} now, {best} at best, over {span}.", others: "other peers",
    pause: "Pause training", resume: "Resume training", publish: "Publish a version",
    published: "Published version {v}.", locked: "To pause, resume or publish here, run",
    lockedThen: "on this machine and follow the link that it prints.",
    choose: "Model", draw: "Draw here", drawHelp: "Draw with mouse, finger or pen. With the keyboard: arrow keys move, space begins and ends a stroke.",
    clear: "Clear", predict: "Predict", picture: "Drop a picture here, or choose a file", values: "{n} numbers, with commas between them",
    given: "Picture chosen: {name}", nothingDrawn: "Draw something first.", noPicture: "Choose a picture first.",
    thinks: "It is {label}", sure: "{p} sure", by: "version {version}, on {peer}, {ms} ms", result: "Answer",
    notReady: "No model can answer yet: {why}", noModels: "No model is published yet.",
    version: "Version", replicas: "Copies", size: "Size", created: "Published", by2: "by {name}", here: "here", part: "{p} here",
    of: "{n} of {m}", versionsOf: "Versions of {name}", older: "Older versions", note: "Note",
    foot: "gossipml {v}. Every peer is equal; data stays where it is, models travel.",
    failed: "That failed: {why}",
    graphSum: "Graph of the network. {sum}. The table of peers below says the same.",
  },
  pt: {
    skip: "Ir para o conteúdo", options: "Opções", language: "Idioma", docs: "API",
    themeAuto: "Cores: as do sistema", themeLight: "Cores: claras", themeDark: "Cores: escuras",
    live: "ao vivo", lost: "conexão perdida, tentando de novo", connecting: "conectando",
    network: "Rede", thisPeer: "Este par", learning: "Aprendizado", ask: "Pergunte ao modelo", models: "Modelos", peers: "Pares",
    alone: "Nenhum outro par ainda. Convide um: gossipml token new",
    sum: "{connected} de {known} pares conectados", more: "e mais {n} na tabela",
    you: "este par",
    accuracy: "Acurácia", loss: "Perda no treino", lossLog: "Perda no treino, por potências de dez", round: "Rodada", age: "Amostras no modelo", sent: "Enviado", received: "Recebido",
    neighbours: "Vizinhos", uptime: "Em execução há", model: "Modelo", state: "Estado", name: "Nome", seen: "Último sinal",
    address: "Endereço", problem: "Observação", now: "agora", ago: "há {t}", data: "Dados",
    states: {
      starting: "iniciando", training: "treinando", paused: "em pausa", averaging: "em média", serving: "servindo",
      stopped: "parado", connected: "conectado", suspect: "em silêncio", lost: "perdido", refused: "recusado",
      quarantined: "em quarentena", known: "conhecido",
    },
    testData: "acurácia nos dados de teste", noPoints: "Nada medido ainda.",
    chartSum: "{what}: {now} agora, {best} no melhor ponto, em {span}.", others: "outros pares",
    pause: "Pausar o treino", resume: "Retomar o treino", publish: "Publicar uma versão",
    published: "Versão {v} publicada.", locked: "Para pausar, retomar ou publicar aqui, execute",
    lockedThen: "nesta máquina e siga o link que aparece.",
    choose: "Modelo", draw: "Desenhe aqui", drawHelp: "Desenhe com mouse, dedo ou caneta. Com o teclado: as setas movem, espaço começa e termina um traço.",
    clear: "Limpar", predict: "Prever", picture: "Solte uma imagem aqui ou escolha um arquivo", values: "{n} números separados por vírgulas",
    given: "Imagem escolhida: {name}", nothingDrawn: "Desenhe algo primeiro.", noPicture: "Escolha uma imagem primeiro.",
    thinks: "É {label}", sure: "{p} de certeza", by: "versão {version}, em {peer}, {ms} ms", result: "Resposta",
    notReady: "Nenhum modelo pode responder ainda: {why}", noModels: "Nenhum modelo publicado ainda.",
    version: "Versão", replicas: "Cópias", size: "Tamanho", created: "Publicada", by2: "por {name}", here: "aqui", part: "{p} aqui",
    of: "{n} de {m}", versionsOf: "Versões de {name}", older: "Versões anteriores", note: "Nota",
    foot: "gossipml {v}. Todos os pares são iguais; os dados ficam onde estão, os modelos viajam.",
    failed: "Não deu certo: {why}",
    graphSum: "Grafo da rede. {sum}. A tabela de pares abaixo diz o mesmo.",
  },
};

const LANGUAGES = Object.keys(WORDS);
let language = kept("language", LANGUAGES) ?? navigator.languages.map((l) => l.slice(0, 2)).find((l) => l in WORDS) ?? "en";

export function t(key, values = {}) {
  return WORDS[language][key].replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

export const stateWord = (state) => WORDS[language].states[state] ?? state;

export const getLanguage = () => language;

export function setLanguage(wanted) {
  language = wanted;
  keep("language", wanted);
}

/** Fill in what stands in the HTML. */
export function translate() {
  document.documentElement.lang = language;
  for (const element of document.querySelectorAll("[data-t]")) element.textContent = t(element.dataset.t);
  for (const element of document.querySelectorAll("[data-label]")) element.setAttribute("aria-label", t(element.dataset.label));
}

export function kept(name, allowed) {
  try {
    const value = localStorage.getItem(`gossipml-${name}`);
    return allowed.includes(value) ? value : null;
  } catch {
    return null;
  }
}

export function keep(name, value) {
  try {
    localStorage.setItem(`gossipml-${name}`, value);
  } catch {
    // A browser may keep nothing.
  }
}

const formatted = (value, options) => new Intl.NumberFormat(language, options).format(value);

export const percent = (value, digits = 1) =>
  value === null || value === undefined ? "–" : formatted(value, { style: "percent", minimumFractionDigits: digits, maximumFractionDigits: digits });

export const number = (value, digits = 0) =>
  value === null || value === undefined ? "–" : formatted(value, { minimumFractionDigits: digits, maximumFractionDigits: digits });

export const short = (value) => formatted(value, { notation: "compact", maximumFractionDigits: 1 });

export function bytes(value) {
  const units = ["byte", "kilobyte", "megabyte", "gigabyte", "terabyte"];
  let unit = 0;
  for (; value >= 1000 && unit < units.length - 1; unit += 1) value /= 1000;
  if (!unit) return `${number(value)} B`;
  return formatted(value, { style: "unit", unit: units[unit], unitDisplay: "short", maximumFractionDigits: unit > 1 ? 1 : 0 });
}

export function span(seconds) {
  const [value, unit] =
    seconds < 60 ? [seconds, "second"] : seconds < 3600 ? [seconds / 60, "minute"] : seconds < 86400 ? [seconds / 3600, "hour"] : [seconds / 86400, "day"];
  const whole = Math.floor(unit === "hour" || unit === "day" ? value * 10 : value) / (unit === "hour" || unit === "day" ? 10 : 1);
  return formatted(whole, { style: "unit", unit, unitDisplay: "short" });
}

export const moment = (seconds) => new Intl.DateTimeFormat(language, { dateStyle: "short", timeStyle: "short" }).format(new Date(seconds * 1000));
