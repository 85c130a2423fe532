-- The newest entries of a conversation below a seq: as many as are asked for, or fewer where they are long, but one at least.
-- KEYS  journal
-- ARGV  the seq, how many, bytes
-- Gives {seq of the first of them, entries from the last to the first}
local last = math.min(redis.call('LLEN', KEYS[1]), tonumber(ARGV[1]) - 1)
local first, left = math.max(0, last - tonumber(ARGV[2])), tonumber(ARGV[3])
local rows = {}
while first < last and left > 0 do
  local page = redis.call('LRANGE', KEYS[1], math.max(first, last - 16), last - 1)
  for n = #page, 1, -1 do
    if #rows > 0 and #page[n] > left then
      return {last + 1, rows}
    end
    rows[#rows + 1] = page[n]
    left = left - #page[n]
    last = last - 1
  end
end
return {last + 1, rows}
