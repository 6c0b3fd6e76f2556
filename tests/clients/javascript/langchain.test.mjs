// LangChain for JavaScript, over chat completions and over responses.
import { ChatOpenAI } from '@langchain/openai';
import { createAgent, providerStrategy, tool, toolStrategy } from 'langchain';
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { answer, arguments_, getWeather, model, question, report, server, wanted } from './common.mjs';

const weather = tool(getWeather, { name: 'get_weather', description: 'Weather of a city', schema: arguments_ });
const input = { messages: [{ role: 'user', content: question }] };

for (const useResponsesApi of [false, true]) {
  const name = useResponsesApi ? 'responses' : 'chat';
  const llm = new ChatOpenAI({ model, apiKey: server.apiKey, maxRetries: 0, useResponsesApi, configuration: { baseURL: server.baseURL } });

  test(`${name}: text, complete and streamed`, async () => {
    assert.equal((await llm.invoke(question)).text, `You said: ${question}`);
    let text = '';
    for await (const chunk of await llm.stream(question)) text += chunk.text;
    assert.equal(text, `You said: ${question}`);
  });
  test(`${name}: tool calls, and an agent`, async () => {
    assert.deepEqual((await llm.bindTools([weather]).invoke(question)).tool_calls.map(call => call.args), [{ city: 'Paris' }]);
    assert.equal((await createAgent({ model: llm, tools: [weather] }).invoke(input)).messages.at(-1).text, answer);
  });
  for (const method of ['jsonSchema', 'functionCalling']) {
    test(`${name}: structured output by ${method}`, async () => {
      assert.equal((await llm.withStructuredOutput(report, { method }).invoke(question)).city, 'Paris');
    });
  }
  test(`${name}: an agent with the provider's response format`, async () => {
    const agent = createAgent({ model: llm, tools: [weather], responseFormat: providerStrategy(report) });
    assert.deepEqual((await agent.invoke(input)).structuredResponse, wanted);
  });
}

test('chat: an agent whose response format is a tool', async () => {  // over responses it sends no tool_choice, so the model decides
  const llm = new ChatOpenAI({ model, apiKey: server.apiKey, maxRetries: 0, configuration: { baseURL: server.baseURL } });
  const agent = createAgent({ model: llm, tools: [weather], responseFormat: toolStrategy(report) });
  assert.deepEqual((await agent.invoke(input)).structuredResponse, wanted);
});
