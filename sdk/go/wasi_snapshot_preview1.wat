;; What Go's runtime asks of WASI, answered within the component: a plugin imports no WASI.
;;
;; There are no arguments, no environment and no files. What is written to standard output and standard error is taken
;; and goes nowhere. The clock starts at 0, in 1970, and moves by a microsecond each time that it is read; a sleep moves
;; it on and takes no time. Random numbers are the same in every instance. Anything else is answered "not supported".
(module
  (import "env" "memory" (memory 0))

  (global $now (mut i64) (i64.const 0))   ;; nanoseconds
  (global $seed (mut i64) (i64.const 0))

  (func $badf (result i32) (i32.const 8))
  (func $nosys (result i32) (i32.const 52))

  ;; Two words of zero: there are no arguments and no variables.
  (func $nothing (param $count i32) (param $size i32) (result i32)
    (i32.store (local.get $count) (i32.const 0))
    (i32.store (local.get $size) (i32.const 0))
    (i32.const 0))
  (func (export "args_sizes_get") (param i32 i32) (result i32) (call $nothing (local.get 0) (local.get 1)))
  (func (export "environ_sizes_get") (param i32 i32) (result i32) (call $nothing (local.get 0) (local.get 1)))
  (func (export "args_get") (param i32 i32) (result i32) (i32.const 0))
  (func (export "environ_get") (param i32 i32) (result i32) (i32.const 0))

  (func (export "clock_res_get") (param i32 i32) (result i32)
    (i64.store (local.get 1) (i64.const 1000))
    (i32.const 0))
  (func (export "clock_time_get") (param $clock i32) (param $precision i64) (param $result i32) (result i32)
    (global.set $now (i64.add (global.get $now) (i64.const 1000)))
    (i64.store (local.get $result) (global.get $now))
    (i32.const 0))

  ;; Answers the first of the subscriptions: a clock's time has come, anything else is ready.
  (func (export "poll_oneoff") (param $in i32) (param $out i32) (param $subscriptions i32) (param $events i32) (result i32)
    (if (i32.eqz (i32.load8_u offset=8 (local.get $in)))
      (then
        (if (i32.and (i32.load16_u offset=40 (local.get $in)) (i32.const 1))
          (then (global.set $now (i64.load offset=24 (local.get $in))))
          (else (global.set $now (i64.add (global.get $now) (i64.load offset=24 (local.get $in))))))))
    (memory.fill (local.get $out) (i32.const 0) (i32.const 32))
    (i64.store (local.get $out) (i64.load (local.get $in)))
    (i32.store8 offset=10 (local.get $out) (i32.load8_u offset=8 (local.get $in)))
    (i32.store (local.get $events) (i32.const 1))
    (i32.const 0))

  (func (export "random_get") (param $at i32) (param $size i32) (result i32)
    (local $end i32) (local $x i64)
    (local.set $end (i32.add (local.get $at) (local.get $size)))
    (block $done
      (loop $next
        (br_if $done (i32.ge_u (local.get $at) (local.get $end)))
        ;; A counter, scrambled.
        (global.set $seed (i64.add (global.get $seed) (i64.const 0x9e3779b97f4a7c15)))
        (local.set $x (global.get $seed))
        (local.set $x (i64.mul (i64.xor (local.get $x) (i64.shr_u (local.get $x) (i64.const 30)))
          (i64.const 0xbf58476d1ce4e5b9)))
        (local.set $x (i64.mul (i64.xor (local.get $x) (i64.shr_u (local.get $x) (i64.const 27)))
          (i64.const 0x94d049bb133111eb)))
        (i64.store8 (local.get $at) (i64.shr_u (local.get $x) (i64.const 56)))
        (local.set $at (i32.add (local.get $at) (i32.const 1)))
        (br $next)))
    (i32.const 0))

  (func (export "fd_write") (param $fd i32) (param $iovs i32) (param $count i32) (param $written i32) (result i32)
    (local $sum i32)
    (block $done
      (loop $next
        (br_if $done (i32.eqz (local.get $count)))
        (local.set $sum (i32.add (local.get $sum) (i32.load offset=4 (local.get $iovs))))
        (local.set $iovs (i32.add (local.get $iovs) (i32.const 8)))
        (local.set $count (i32.sub (local.get $count) (i32.const 1)))
        (br $next)))
    (i32.store (local.get $written) (local.get $sum))
    (i32.const 0))

  (func (export "sched_yield") (result i32) (i32.const 0))
  (func (export "proc_exit") (param i32) unreachable)
  (func (export "proc_raise") (param i32) (result i32) unreachable)

  ;; Nothing is open.
  (func (export "fd_advise") (param i32 i64 i64 i32) (result i32) (call $badf))
  (func (export "fd_allocate") (param i32 i64 i64) (result i32) (call $badf))
  (func (export "fd_close") (param i32) (result i32) (call $badf))
  (func (export "fd_datasync") (param i32) (result i32) (call $badf))
  (func (export "fd_fdstat_get") (param i32 i32) (result i32) (call $badf))
  (func (export "fd_fdstat_set_flags") (param i32 i32) (result i32) (call $badf))
  (func (export "fd_fdstat_set_rights") (param i32 i64 i64) (result i32) (call $badf))
  (func (export "fd_filestat_get") (param i32 i32) (result i32) (call $badf))
  (func (export "fd_filestat_set_size") (param i32 i64) (result i32) (call $badf))
  (func (export "fd_filestat_set_times") (param i32 i64 i64 i32) (result i32) (call $badf))
  (func (export "fd_pread") (param i32 i32 i32 i64 i32) (result i32) (call $badf))
  (func (export "fd_prestat_get") (param i32 i32) (result i32) (call $badf))
  (func (export "fd_prestat_dir_name") (param i32 i32 i32) (result i32) (call $badf))
  (func (export "fd_pwrite") (param i32 i32 i32 i64 i32) (result i32) (call $badf))
  (func (export "fd_read") (param i32 i32 i32 i32) (result i32) (call $badf))
  (func (export "fd_readdir") (param i32 i32 i32 i64 i32) (result i32) (call $badf))
  (func (export "fd_renumber") (param i32 i32) (result i32) (call $badf))
  (func (export "fd_seek") (param i32 i64 i32 i32) (result i32) (call $badf))
  (func (export "fd_sync") (param i32) (result i32) (call $badf))
  (func (export "fd_tell") (param i32 i32) (result i32) (call $badf))

  (func (export "path_create_directory") (param i32 i32 i32) (result i32) (call $nosys))
  (func (export "path_filestat_get") (param i32 i32 i32 i32 i32) (result i32) (call $nosys))
  (func (export "path_filestat_set_times") (param i32 i32 i32 i32 i64 i64 i32) (result i32) (call $nosys))
  (func (export "path_link") (param i32 i32 i32 i32 i32 i32 i32) (result i32) (call $nosys))
  (func (export "path_open") (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32) (call $nosys))
  (func (export "path_readlink") (param i32 i32 i32 i32 i32 i32) (result i32) (call $nosys))
  (func (export "path_remove_directory") (param i32 i32 i32) (result i32) (call $nosys))
  (func (export "path_rename") (param i32 i32 i32 i32 i32 i32) (result i32) (call $nosys))
  (func (export "path_symlink") (param i32 i32 i32 i32 i32) (result i32) (call $nosys))
  (func (export "path_unlink_file") (param i32 i32 i32) (result i32) (call $nosys))
  (func (export "sock_accept") (param i32 i32 i32) (result i32) (call $nosys))
  (func (export "sock_recv") (param i32 i32 i32 i32 i32 i32) (result i32) (call $nosys))
  (func (export "sock_send") (param i32 i32 i32 i32 i32) (result i32) (call $nosys))
  (func (export "sock_shutdown") (param i32 i32) (result i32) (call $nosys)))
