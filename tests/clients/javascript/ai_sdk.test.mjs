// The Vercel AI SDK, by each of its three providers for such a server.
import { createOpenAI } from '@ai-sdk/openai';
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { generateObject, generateText, Output, stepCountIs, streamObject, streamText, tool } from 'ai';
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { answer, arguments_, getWeather, model, question, report, server, wanted } from './common.mjs';

const providers = {
  compatible: createOpenAICompatible({ ...server, name: 'minivllm', supportsStructuredOutputs: true })(model),
  chat: createOpenAI(server).chat(model),
  responses: createOpenAI(server)(model),
};
const tools = { get_weather: tool({ description: 'Weather of a city', inputSchema: arguments_, execute: getWeather }) };

for (const [name, provider] of Object.entries(providers)) {
  const request = { model: provider, prompt: question, maxRetries: 0 };
  const agent = { ...request, tools, stopWhen: stepCountIs(4) };

  test(`${name}: text, complete and streamed`, async () => {
    assert.equal((await generateText(request)).text, `You said: ${question}`);
    assert.equal(await streamText(request).text, `You said: ${question}`);
  });
  test(`${name}: a loop of tool calls, complete and streamed`, async () => {
    assert.equal((await generateText(agent)).text, answer);
    assert.equal(await streamText(agent).text, answer);
  });
  test(`${name}: a forced call`, async () => {
    const { toolCalls } = await generateText({ ...request, tools, toolChoice: 'required' });
    assert.deepEqual(toolCalls.map(call => call.input), [{ city: 'Paris' }]);
  });
  test(`${name}: a second turn sends the first one back`, async () => {
    const first = await generateText(agent);
    const next = { role: 'user', content: 'And the weather in Rome?' };
    const messages = [{ role: 'user', content: question }, ...first.response.messages, next];
    assert.equal((await generateText({ ...agent, prompt: undefined, messages })).text, 'The result is sunny in Rome.');
  });
  test(`${name}: an object, complete and streamed`, async () => {
    assert.equal((await generateObject({ ...request, schema: report })).object.city, 'Paris');
    let last;
    for await (const partial of streamObject({ ...request, schema: report }).partialObjectStream) last = partial;
    assert.equal(last.city, 'Paris');
  });
  test(`${name}: an output object beside tools, complete and streamed`, async () => {
    const both = { ...agent, output: Output.object({ schema: report }) };
    assert.deepEqual((await generateText(both)).output, wanted);
    assert.deepEqual(await streamText(both).output, wanted);
  });
}
