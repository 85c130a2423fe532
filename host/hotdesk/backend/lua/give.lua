-- Hand a partition over. The new owner hears of it at once; "" leaves it to whoever comes.
-- KEYS  own, in, tries
-- ARGV  base, me, epoch, to, then the messages whose turns were begun: their next one is not the first
local own = redis.call('HMGET', KEYS[1], 'owner', 'epoch')
if own[1] ~= ARGV[2] or own[2] ~= ARGV[3] then
  return 0
end
redis.call('HSET', KEYS[1], 'owner', ARGV[4])
local epoch = redis.call('HINCRBY', KEYS[1], 'epoch', 1)
for i = 5, #ARGV do
  if #redis.call('XRANGE', KEYS[2], ARGV[i] .. '-0', ARGV[i] .. '-0') == 1 then
    redis.call('HSETNX', KEYS[3], ARGV[i], 0)
  end
end
if ARGV[4] ~= '' then
  redis.call('SPUBLISH', ARGV[1] .. 'h:' .. ARGV[4], 'o ' .. epoch .. ' ' .. ARGV[2])
end
return 1
