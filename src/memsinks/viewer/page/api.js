// Questions to the server of this page; nothing else is ever asked.

const token = new URLSearchParams(location.search).get("token") ?? "";

function post(name, question, signal) {
  const headers = { "Content-Type": "application/json", "X-Memsinks-Token": token };
  return fetch(`/api/${name}`, { method: "POST", headers, body: JSON.stringify(question), signal }).catch((error) => {
    if (error.name === "AbortError") throw error;
    throw new Error("memsinks view does not answer; has it been ended?");
  });
}

/** The answer to a question; an Error with the server's words. */
export async function ask(name, question = {}) {
  const response = await post(name, question);
  const answer = await response.json();
  if (answer.error) throw new Error(answer.error);
  return answer;
}

/** The events of an answer that comes a line at a time; an Error with the server's words. */
export async function* events(name, question, signal) {
  const response = await post(name, question, signal);
  if (!response.ok) throw new Error((await response.json()).error);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const event of lines.map((line) => JSON.parse(line))) {
      if (event.kind === "error") throw new Error(event.error);
      yield event;
    }
  }
}

export const recordAddress = (name) => `/record/${encodeURIComponent(name)}?token=${encodeURIComponent(token)}`;
