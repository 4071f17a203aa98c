use std::cell::RefCell;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::allocator::{areas_held, refuse_from};
use super::*;
use crate::device::threads::run_apart_with_reserve;

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

/// The tests that count areas must not run beside each other.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs `body` with blocks of at least `from` bytes refused on this thread.
fn refused<T>(from: usize, body: impl FnOnce() -> T) -> T {
    struct Restore;
    impl Drop for Restore {
        fn drop(&mut self) {
            refuse_from(usize::MAX);
        }
    }
    let _restore = Restore;
    refuse_from(from);
    body()
}

fn is_out_of_memory<T>(result: Result<T>) -> bool {
    matches!(result, Err(Error::OutOfMemory { what, .. }) if what == "test")
}

#[test]
fn work_that_is_refused_nothing_keeps_its_result() {
    assert_eq!(with("test", MIB, || Ok(vec![1u8; MIB])).unwrap().len(), MIB);
    assert!(matches!(with("test", 0, || Err::<(), _>(Error::Cancelled)), Err(Error::Cancelled)));
}

#[test]
fn refused_blocks_come_from_the_reserve() {
    let result = with("test", 4 * MIB, || {
        refused(64 * KIB, || {
            // Grows block by block and where it is, zeroed and aligned.
            let mut grown: Vec<u64> = Vec::new();
            let mut other = Vec::new();
            for i in 0..100_000u64 {
                grown.push(i);
                if i % 30_000 == 0 {
                    other.push(vec![0u8; 100 * KIB]);
                }
            }
            assert!(grown.iter().copied().eq(0..100_000));
            assert!(other.iter().flatten().all(|&byte| byte == 0));
            grown.shrink_to(10);
            #[repr(align(4096))]
            struct Page([u8; 70 * KIB]);
            let page = Box::new(Page([7; 70 * KIB]));
            assert_eq!((&raw const *page).addr() % 4096, 0);
            assert_eq!(page.0[69 * KIB], 7);
            drop(other);
            Ok(grown)
        })
    });
    assert!(is_out_of_memory(result));
}

#[test]
fn errors_and_panics_become_out_of_memory_too() {
    let touch = || refused(KIB, || drop(std::hint::black_box(vec![1u8; 64 * KIB])));
    let failing = with("test", 0, || -> Result<()> {
        touch();
        Err(Error::Cancelled)
    });
    assert!(is_out_of_memory(failing));
    let panicking = with("test", 0, || -> Result<()> {
        touch();
        panic!("on purpose")
    });
    assert!(is_out_of_memory(panicking));
    let untouched = std::panic::catch_unwind(|| with("test", 0, || -> Result<()> { panic!("on purpose") }));
    assert!(untouched.is_err());
}

#[test]
fn the_reserve_is_at_hand_while_the_result_is_dropped() {
    struct Allocates(#[allow(dead_code)] Vec<u8>);
    impl Drop for Allocates {
        fn drop(&mut self) {
            drop(std::hint::black_box(refused(KIB, || vec![1u8; 3 * MIB])));
        }
    }
    assert!(is_out_of_memory(with("test", 0, || Ok(refused(KIB, || Allocates(vec![1; 64 * KIB]))))));
}

#[test]
fn nested_work_has_both_reserves() {
    let result = with("test", 64 * MIB, || {
        let inner = with("inner", 0, || Ok(refused(KIB, || vec![1u8; 64 * KIB])));
        assert!(matches!(inner, Err(Error::OutOfMemory { what, .. }) if what == "inner"));
        assert_eq!(vec![2u8; 64 * KIB].len(), 64 * KIB);
        Ok(5)
    });
    // The inner one sufficed.
    assert_eq!(result.unwrap(), 5);
    let result = with("test", 64 * MIB, || {
        // More than the inner one has.
        drop(with("inner", 0, || Ok(refused(KIB, || vec![1u8; 40 * MIB]))));
        Ok(5)
    });
    assert!(is_out_of_memory(result));
    let reserve = Reserve::new("test", 0).unwrap();
    assert!(reserve.guard(|| reserve.guard(|| Ok(1))).is_ok());
    let other = Reserve::new("test", 0).unwrap();
    let twice = reserve.guard(|| other.guard(|| reserve.guard(|| Ok(refused(KIB, || vec![1u8; 64 * KIB])))));
    assert!(is_out_of_memory(twice));
}

#[test]
fn fallible_code_is_told() {
    let result = with("test", 0, || {
        refused(KIB, || {
            assert!(Vec::<u8>::new().try_reserve_exact(64 * MIB).is_err());
            assert!(crate::device::Buffer::new("a buffer", 64 * KIB).is_err());
        });
        Ok(())
    });
    assert!(is_out_of_memory(result));
    // A buffer alone does not touch the reserve.
    let result = with("test", 0, || {
        refused(64 * KIB, || assert!(crate::device::Buffer::new("a buffer", 64 * KIB).is_err()));
        Ok(())
    });
    assert!(result.is_ok());
}

#[test]
fn more_than_there_is_room_for_is_an_error() {
    assert!(is_out_of_memory(with("test", usize::MAX, || Ok(()))));
    assert!(is_out_of_memory(with("test", usize::MAX / 4, || Ok(()))));
}

#[test]
fn small_blocks_need_no_reserve() {
    let text = refused(1, || "small".repeat(100));
    assert_eq!(text, "small".repeat(100));
    assert!(refused(1, || Vec::<u8>::new().try_reserve_exact(64 * MIB)).is_err());
    // Freed and grown where nothing is refused.
    let mut grown = refused(1, || vec![3u8; 1000]);
    grown.resize(100_000, 3);
    assert!(grown.iter().all(|&byte| byte == 3));
}

#[test]
fn a_block_that_outlives_the_work_keeps_the_mapping() {
    let _alone = alone();
    static KEPT: Mutex<Vec<Vec<u8>>> = Mutex::new(Vec::new());
    let before = areas_held();
    let result = with("test", 0, || {
        refused(KIB, || {
            KEPT.lock().unwrap().push(vec![9; 64 * KIB]);
            KEPT.lock().unwrap().push(vec![8; 64 * KIB]);
        });
        Ok(())
    });
    assert!(is_out_of_memory(result));
    assert!(areas_held() > before);
    let mut kept = std::mem::take(&mut *KEPT.lock().unwrap());
    assert!(kept[0].iter().all(|&byte| byte == 9) && kept[1].iter().all(|&byte| byte == 8));
    // Growing moves it to the system's memory; the other one is freed elsewhere.
    kept[0].resize(MIB, 9);
    assert!(kept[0].iter().all(|&byte| byte == 9));
    let second = kept.pop();
    std::thread::scope(|scope| scope.spawn(move || drop(second)).join().unwrap());
    wait_for(before);
}

#[test]
fn caches_of_an_ended_thread_are_freed() {
    thread_local! {
        static CACHE: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    }
    let _alone = alone();
    let before = areas_held();
    for _ in 0..20 {
        let result = run_apart_with_reserve("test", 0, || {
            refused(KIB, || CACHE.with(|cache| cache.borrow_mut().resize(100 * KIB, 1)));
            Ok(())
        });
        assert!(is_out_of_memory(result));
    }
    wait_for(before);
}

/// Other tests hold areas for a while.
fn wait_for(held: usize) {
    for _ in 0..2000 {
        if areas_held() <= held {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    panic!("{} areas are held, {held} were", areas_held());
}

#[test]
fn a_full_table_refuses_work() {
    let _alone = alone();
    let mut held = Vec::new();
    while let Ok(reserve) = Reserve::new("test", 0) {
        held.push(reserve);
    }
    assert!(held.len() > 500, "{}", held.len());
    assert!(is_out_of_memory(with("test", 0, || Ok(()))));
    drop(held);
    assert!(with("test", 0, || Ok(())).is_ok());
}

#[test]
fn many_threads_at_once() {
    std::thread::scope(|scope| {
        for thread in 0..8u8 {
            scope.spawn(move || {
                for round in 0..100 {
                    let result = with("test", MIB, || {
                        let from = if round % 2 == 0 { KIB } else { usize::MAX };
                        let blocks: Vec<Vec<u8>> =
                            refused(from, || (0..20).map(|_| vec![thread; 10 * KIB]).collect());
                        assert!(blocks.iter().flatten().all(|&byte| byte == thread));
                        Ok(blocks)
                    });
                    assert_eq!(is_out_of_memory(result), round % 2 == 0);
                    let text = refused(1, || vec![thread; 500]);
                    assert!(text.iter().all(|&byte| byte == thread));
                }
            });
        }
    });
}
