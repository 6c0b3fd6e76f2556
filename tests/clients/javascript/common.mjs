// What all tests use: the server, a question, a tool, and a schema for the answer.
import { z } from 'zod';

export const server = { baseURL: process.env.CLIENTS_BASE_URL, apiKey: 'unused', maxRetries: 0 };
export const model = process.env.CLIENTS_MODEL;
export const question = 'What is the weather in Paris?';
export const answer = 'The result is sunny in Paris.';
export const arguments_ = z.object({ city: z.string() });
export const getWeather = async ({ city }) => `sunny in ${city}`;
export const report = z.object({ city: z.string(), summary: z.string() });
export const wanted = { city: 'Paris', summary: 'sunny in Paris' };
