// What visitors can ask for, and how each is put to a model: with its chat template, or, for models that only
// continue texts, as a plain text that shows by examples what is wanted.

export const LANGUAGES = {
  English: ["Where is the station?", "Thank you, that is very kind of you."],
  Arabic: ["أين المحطة؟", "شكرًا لك، هذا لطف كبير منك."],
  Chinese: ["车站在哪里？", "谢谢，您真是太好了。"],
  Dutch: ["Waar is het station?", "Dank u, dat is heel vriendelijk van u."],
  French: ["Où est la gare ?", "Merci, c'est très gentil de votre part."],
  German: ["Wo ist der Bahnhof?", "Danke, das ist sehr freundlich von Ihnen."],
  Hindi: ["स्टेशन कहाँ है?", "धन्यवाद, यह आपकी बड़ी कृपा है।"],
  Indonesian: ["Di mana stasiunnya?", "Terima kasih, Anda baik sekali."],
  Italian: ["Dov'è la stazione?", "Grazie, è molto gentile da parte sua."],
  Japanese: ["駅はどこですか？", "ありがとうございます。ご親切に感謝します。"],
  Portuguese: ["Onde fica a estação?", "Obrigado, é muito gentil da sua parte."],
  Russian: ["Где вокзал?", "Спасибо, это очень любезно с вашей стороны."],
  Spanish: ["¿Dónde está la estación?", "Gracias, es muy amable de su parte."],
};

/** What Write writes: for chat models an instruction, for others how such a text may begin. */
export const KINDS = {
  "Continue my text": {
    ask: (text) => `Continue this text in the same style. Reply with the continuation only.\n\n${text}`,
    begin: (text) => text,
  },
  "A story": {
    ask: (text) => `Write a short story about this: ${text}`,
    begin: (text) => `A short story. Its subject: ${text}\n\nOnce upon a time,`,
  },
  "A poem": {
    ask: (text) => `Write a poem about this: ${text}`,
    begin: (text) => `A poem. Its subject: ${text}\n\n`,
  },
  "An e-mail": {
    ask: (text) => `Write an e-mail. What it should say: ${text}`,
    begin: (text) => `An e-mail. What it says: ${text}\n\nDear`,
  },
  "A summary": {
    ask: (text) => `Summarize this text in a few sentences.\n\n${text}`,
    begin: (text) => `${text}\n\nIn short:`,
  },
};

const CHAT_EXAMPLE = `A conversation between a person and an assistant, who knows a lot and says it clearly.

User: What do bees collect?
Assistant: Nectar and pollen. They make honey from the nectar, and feed the pollen to their young.`;

const ASK_EXAMPLES = `Question: What is the capital of Japan?
Answer: Tokyo.

Question: Why is the sky blue?
Answer: Air scatters blue light more than red light, so blue reaches us from everywhere in the sky.`;

/** Each task: `turns` says whether earlier turns are part of what is asked. */
export const TASKS = {
  chat: {
    label: "Chat",
    turns: true,
    temperature: 0.7,
    title: "What is on your mind?",
    placeholder: "Write a message",
    examples: [
      "Explain black holes to a ten-year-old",
      "Help me plan a weekend without screens",
      "What makes a good apology?",
    ],
  },
  ask: {
    label: "Ask",
    turns: false,
    temperature: 0.2,
    title: "What would you like to know?",
    placeholder: "Ask a question",
    note: "Each question stands for itself.",
    examples: ["Why do leaves turn red in autumn?", "How does a vaccine work?", "Who was Ada Lovelace?"],
  },
  translate: {
    label: "Translate",
    turns: false,
    temperature: 0,
    title: "What shall I translate?",
    placeholder: "Write or paste a text",
    note: "From any language that the model knows.",
    examples: ["The early bird catches the worm.", "Could you tell me the way to the library?"],
    foreign: ["L'habit ne fait pas le moine.", "Könnten Sie mir den Weg zur Bibliothek zeigen?"],
  },
  write: {
    label: "Write",
    turns: false,
    temperature: 0.9,
    title: "What shall we write?",
    placeholder: "A subject, or the beginning of a text",
    examples: [
      "A lighthouse keeper who is afraid of the sea",
      "The first snow of the year",
      "Asking the neighbours to feed the cat",
    ],
  },
};

/** What a visitor has not chosen yet; texts are translated into the browser's language. */
export function defaultOptions(language = navigator.language) {
  const name = new Intl.DisplayNames(["en"], { type: "language" }).of(language.split("-")[0]);
  return { to: name in LANGUAGES ? name : "English", kind: "A story" };
}

/** What the visitor may begin with. */
export function examplesOf(task, { to }) {
  const { examples, foreign } = TASKS[task];
  return foreign && to === "English" ? foreign : examples;
}

/** The request that puts the last of `turns` ({role, text, options}) to a model: {path, body}. */
export function requestFor(task, turns, model, settings) {
  const sampling = {
    model: model.id,
    max_tokens: settings.maxTokens,
    temperature: settings.temperature ?? TASKS[task].temperature,
  };
  const asked = TASKS[task].turns ? turns : turns.slice(-1);
  if (model.has_chat_template)
    return { path: "/v1/chat/completions", body: { ...sampling, messages: messages(task, asked, settings) } };
  return { path: "/v1/completions", body: { ...sampling, ...plain(task, asked, settings) } };
}

function messages(task, turns, { system }) {
  const content = ({ role, text, options }) => (role === "user" ? instruct(task, text, options) : text);
  const told = turns.map((turn) => ({ role: turn.role, content: content(turn) }));
  return task === "chat" && system ? [{ role: "system", content: system }, ...told] : told;
}

function instruct(task, text, options) {
  if (task === "translate")
    return `Translate the following text to ${options.to}. Reply with the translation only.\n\n${text}`;
  if (task === "write") return (KINDS[options.kind] ?? KINDS["A story"]).ask(text);
  return text;
}

function plain(task, turns, { system }) {
  const { text, options } = turns.at(-1);
  if (task === "ask") return { prompt: `${ASK_EXAMPLES}\n\nQuestion: ${text}\nAnswer:`, stop: ["\nQuestion:"] };
  if (task === "translate") return { prompt: translation(text, options.to), stop: ["\nText:"] };
  if (task === "write") return { prompt: (KINDS[options.kind] ?? KINDS["A story"]).begin(text) };
  const lines = turns.map(({ role, text: said }) => `${role === "user" ? "User" : "Assistant"}: ${said.trim()}`);
  return { prompt: [system || CHAT_EXAMPLE, "", ...lines, "Assistant:"].join("\n"), stop: ["\nUser:"] };
}

function translation(text, to) {
  const from = to === "English" ? LANGUAGES.French : LANGUAGES.English;
  const into = LANGUAGES[to] ?? LANGUAGES.English;
  const shown = from.map((said, index) => `Text: ${said}\n${to}: ${into[index]}\n`);
  return `${shown.join("\n")}\nText: ${text}\n${to}:`;
}
