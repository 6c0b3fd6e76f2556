// The official client with its helpers, and the Agents SDK.
import { Agent, run, setDefaultOpenAIClient, setOpenAIAPI, setTracingDisabled, tool } from '@openai/agents';
import assert from 'node:assert/strict';
import { test } from 'node:test';
import OpenAI from 'openai';
import { zodFunction, zodResponseFormat, zodTextFormat } from 'openai/helpers/zod';
import { answer, arguments_, getWeather, model, question, report, server, wanted } from './common.mjs';

const api = new OpenAI(server);
const messages = [{ role: 'user', content: question }];
const weather = zodFunction({ name: 'get_weather', description: 'Weather of a city', parameters: arguments_, function: getWeather });

test('chat: create, and the stream helper', async () => {
  assert.equal((await api.chat.completions.create({ model, messages })).choices[0].message.content, `You said: ${question}`);
  assert.equal(await api.chat.completions.stream({ model, messages }).finalContent(), `You said: ${question}`);
});
test('chat: runTools, complete and streamed, with and without a format', async () => {
  for (const stream of [false, true]) {
    assert.equal(await api.chat.completions.runTools({ model, messages, tools: [weather], stream }).finalContent(), answer);
    const format = { response_format: zodResponseFormat(report, 'report') };
    const content = await api.chat.completions.runTools({ model, messages, tools: [weather], stream, ...format }).finalContent();
    assert.deepEqual(JSON.parse(content), wanted);
  }
});
test('chat: the parsed message is a valid history', async () => {
  const request = { model, tools: [weather], response_format: zodResponseFormat(report, 'report') };
  const first = (await api.chat.completions.parse({ ...request, messages })).choices[0].message;
  const result = { role: 'tool', tool_call_id: first.tool_calls[0].id, content: 'mild' };
  const second = (await api.chat.completions.parse({ ...request, messages: [...messages, first, result] })).choices[0].message;
  assert.deepEqual(second.parsed, { city: 'Paris', summary: 'mild' });
  const history = [...messages, first, result, second, { role: 'user', content: 'Thanks' }];
  const third = await api.chat.completions.create({ model, messages: history });
  assert.equal(third.choices[0].message.content, 'You said: Thanks');
});
test('responses: create, parse, and the stream helper', async () => {
  assert.equal((await api.responses.create({ model, input: question })).output_text, `You said: ${question}`);
  const text = { format: zodTextFormat(report, 'report') };
  assert.equal((await api.responses.parse({ model, input: question, text })).output_parsed.city, 'Paris');
  assert.equal((await api.responses.stream({ model, input: question }).finalResponse()).output_text, `You said: ${question}`);
});
test('responses: previous_response_id', async () => {
  const first = await api.responses.create({ model, input: question });
  assert.equal((await api.responses.create({ model, input: 'Thanks', previous_response_id: first.id })).output_text, 'You said: Thanks');
});

setDefaultOpenAIClient(api);
setTracingDisabled(true);
const tools = [tool({ name: 'get_weather', description: 'Weather of a city', parameters: arguments_, execute: getWeather })];
for (const kind of ['chat_completions', 'responses']) {
  test(`agents over ${kind}: tools, and an output type`, async () => {
    setOpenAIAPI(kind);
    assert.equal((await run(new Agent({ name: 'assistant', model, tools }), question)).finalOutput, answer);
    assert.deepEqual((await run(new Agent({ name: 'assistant', model, tools, outputType: report }), question)).finalOutput, wanted);
  });
}
