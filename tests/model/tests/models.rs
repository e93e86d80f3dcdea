//! Runs every model as a test.

macro_rules! models {
    ($($room:ident: $($model:ident)*;)*) => {
        $(mod $room {
            $(#[test]
            fn $model() {
                virtioblkd_test_model::$room::$model();
            })*
        })*
    };
}

models! {
    epoch_models:
        a_look_within_a_turn
        a_pinned_request_over_turns
        a_pinned_request_over_a_sleep
        requests_that_end_out_of_order
        two_workers_and_one_that_leaves
        what_nobody_looks_at_passes;
    limbo_models:
        a_discard_against_a_flush
        frees_of_neighbours_against_a_flush
        a_read_against_discard_flush_and_reuse
        a_read_of_the_later_of_two_neighbours
        a_read_a_discard_and_a_flush
        no_cluster_has_two_owners;
    arena_models:
        close_against_a_refill
        one_refill_at_a_time
        nobody_sleeps_through_the_end_of_a_refill
        a_failed_refill_is_told
        idle_ends_when_the_refill_has;
    slice_models:
        a_change_against_an_eviction
        a_change_against_a_flush_and_an_eviction
        a_change_a_flush_and_an_eviction
        two_changes_and_a_flush;
}
