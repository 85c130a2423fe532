-- Entries of a conversation above a seq: as many as are asked for, or fewer where they are long, but one at least.
-- KEYS  journal
-- ARGV  the seq, how many, bytes
-- Gives {how many entries the conversation has, entries…}
local first, left = tonumber(ARGV[1]), tonumber(ARGV[3])
local length = redis.call('LLEN', KEYS[1])
local last = math.min(first + tonumber(ARGV[2]), length)
local rows = {}
while first < last and left > 0 do
  local page = redis.call('LRANGE', KEYS[1], first, math.min(first + 16, last) - 1)
  for _, row in ipairs(page) do
    if #rows > 0 and #row > left then
      return {length, rows}
    end
    rows[#rows + 1] = row
    left = left - #row
  end
  first = first + 16
end
return {length, rows}
