// Colours for code: comments, strings, numbers and words of the language. A reader's aid, not a parser.

import { el } from "./dom.js";

const MAX_CHARACTERS = 40_000;
const STRING = /"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*'|`(?:[^`\\]|\\.)*`/.source;
const NUMBER = /\b(?:0[xob][\da-f_]+|\d[\d_]*(?:\.\d+)?(?:e[+-]?\d+)?)\b/.source;
const NAME = /[\p{L}_$][\p{L}\p{N}_$]*/.source;

const C_LIKE = `abstract as async await bool boolean break case catch char class const continue crate default
  defer delete do double dyn else enum export extends extern false final finally float fn for foreach from func
  function go goto if impl implements import in instanceof int interface is let long loop match mod move mut
  namespace new nil null of override package private protected pub public readonly ref return self short signed
  static string struct super switch template this throw throws trait true try type typeof undefined union unsafe
  unsigned use using val var virtual void volatile when where while with yield`;
const HASH = `alias and as assert async await begin break case class continue def del do done echo elif else elsif
  end esac except export False fi finally for from function global if import in is lambda local match module
  None nonlocal not or pass raise require rescue return self set then True try unless until while with yield
  true false null`;
const SQL = `add all alter and as asc between by case create cross default delete desc distinct drop else end exists
  from full group having in index inner insert into is join key left like limit not null on or order outer primary
  references right select set table then union unique update values view when where with`;

const FAMILIES = [
  { names: "python py ruby rb sh bash shell zsh r perl yaml yml toml dockerfile make makefile elixir julia", words: HASH,
    comment: /#.*/.source, strings: /"""[^]*?(?:"""|$)|'''[^]*?(?:'''|$)/.source },
  { names: "sql postgresql mysql sqlite lua haskell", words: SQL, comment: /--.*/.source, fold: true },
  { names: "html xml svg", words: "", comment: /<!--[^]*?(?:-->|$)/.source },
  { names: "text txt plain plaintext markdown md console output", words: null },
];
const DEFAULT = { words: C_LIKE, comment: /\/\/.*|\/\*[^]*?(?:\*\/|$)/.source };

/** Append code, as text in coloured spans, to `parent`. */
export function appendCode(parent, text, language) {
  const family = FAMILIES.find(({ names }) => names.split(" ").includes(language)) ?? DEFAULT;
  if (!language || family.words === null || text.length > MAX_CHARACTERS) {
    parent.append(text);
    return;
  }
  const words = new Set(family.words.split(/\s+/));
  let from = 0;
  for (const found of text.matchAll(expression(family))) {
    const kind = kindOf(found, words, family.fold);
    if (!kind) continue;
    parent.append(text.slice(from, found.index), el("span", { class: `code-${kind}`, text: found[0] }));
    from = found.index + found[0].length;
  }
  parent.append(text.slice(from));
}

function expression({ comment, strings }) {
  const quoted = strings ? `${strings}|${STRING}` : STRING;
  return new RegExp(`(?<comment>${comment})|(?<string>${quoted})|(?<number>${NUMBER})|(?<name>${NAME})`, "giu");
}

function kindOf({ groups }, words, fold) {
  if (groups.comment) return "comment";
  if (groups.string) return "string";
  if (groups.number) return "number";
  return words.has(fold ? groups.name.toLowerCase() : groups.name) ? "word" : null;
}
