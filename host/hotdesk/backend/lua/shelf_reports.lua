-- What workers said after the report with a number.
-- KEYS  reports, count
-- ARGV  number
-- Gives {count, seconds now, {workers…}, {worker, report…}}
local count = tonumber(redis.call('GET', KEYS[2]) or 0)
local since = tonumber(ARGV[1])
local names, fresh = {}, {}
local rows = redis.call('HGETALL', KEYS[1])
for i = 1, #rows, 2 do
  names[#names + 1] = rows[i]
  if tonumber(string.match(rows[i + 1], '^%d+')) > since then
    fresh[#fresh + 1] = rows[i]
    fresh[#fresh + 1] = rows[i + 1]
  end
end
return {count, redis.call('TIME')[1], names, fresh}
