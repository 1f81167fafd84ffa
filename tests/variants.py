"""How many variants of a test are fast, how many run with the slow tests (`make check`), and what is left.

Whoever changes a line of code wants an answer in minutes, and it seldom takes forty variants of one test to give it.
The fast ones are spread over all that a test has. A test that has none trains for long. Where the slow ones are many,
`make check` runs some that are spread in the same way, and `make thorough` the rest.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from math import gcd

import pytest

FAST: Mapping[str, int] = {
    "adapter/test_export.py::test_a_bf16_base_stays_bf16_and_its_adapter_fp32": 3,
    "adapter/test_export.py::test_a_finished_run_exports_what_it_trained": 3,
    "adapter/test_export.py::test_consumers_compute_the_trained_update_exactly_where_the_table_says_so": 12,
    "adapter/test_export.py::test_every_profile_reloads_into_the_trained_model": 5,
    "adapter/test_export.py::test_one_open_module_is_enough": 3,
    "adapter/test_export.py::test_the_training_config_does_not_matter": 6,
    "adapter/test_export_safety.py::test_the_model_is_left_as_it_was": 3,
    "cli/test_cli_bad_steps.py::TestPlainLoRA::test_a_bad_step_moves_nothing_and_the_others_do": 1,
    "cli/test_cli_bad_steps.py::test_are_told_at_once_then_once_in_a_while_and_counted": 1,
    "cli/test_cli_bad_steps.py::test_more_than_half_is_a_failed_run_that_keeps_what_it_trained": 1,
    "cli/test_cli_best.py::TestEarlyStopping::test_a_resumed_run_counts_on": 1,
    "cli/test_cli_best.py::TestEarlyStopping::test_a_run_that_had_ended_ends_there_again": 0,
    "cli/test_cli_choices.py::test_learns_to_choose_and_a_killed_run_goes_on": 1,
    "cli/test_cli_choices.py::test_methods_that_look_at_data": 1,
    "cli/test_cli_choices.py::test_predictions_are_choices": 1,
    "cli/test_cli_classes.py::test_several_labels_a_row": 0,
    "cli/test_cli_dry_run.py::test_the_run_and_its_rehearsal_refuse_alike": 5,
    "cli/test_cli_early.py::test_modules_that_do_not_exist": 4,
    "cli/test_cli_errors.py::TestTracebacks::test_a_learning_rate_that_diverges": 1,
    "cli/test_cli_full_disk.py::test_elsewhere": 1,
    "cli/test_cli_full_disk.py::test_in_a_checkpoint": 1,
    "cli/test_cli_full_disk.py::test_other_errors_of_files_are_what_they_are": 0,
    "cli/test_cli_full_disk.py::test_where_nothing_was_saved": 1,
    "cli/test_cli_language.py::test_a_run_killed_and_resumed_is_the_same_run": 1,
    "cli/test_cli_language.py::test_methods_that_look_at_data_look_at_examples_one_by_one": 1,
    "cli/test_cli_methods.py::test_trains_allocates_and_exports": 1,
    "cli/test_cli_papers.py::test_ten_steps_end_in_an_adapter_with_all_that_is_new": 3,
    "cli/test_cli_passthrough.py::TestAdapter::test_rslora_scales_by_the_root_in_the_run_its_plan_and_its_export": 1,
    "cli/test_cli_passthrough.py::TestResuming::test_goes_on_as_if_nothing_had_happened": 2,
    "cli/test_cli_resume.py::TestBest::test_a_best_state_that_is_damaged_is_not_exported": 0,
    "cli/test_cli_resume.py::TestBest::test_a_run_that_lost_its_best_state_does_not_go_on_as_if_it_had_none": 0,
    "cli/test_cli_resume.py::TestBest::test_older_checkpoints_go_once_the_new_one_is_whole": 0,
    "cli/test_cli_resume.py::TestChanges::test_of_a_plan_are_refused": 0,
    "cli/test_cli_resume.py::TestChanges::test_of_evaluation_are_not_free_where_it_decides": 0,
    "cli/test_cli_resume.py::TestChanges::test_of_logging_and_evaluation_are_free_and_said": 0,
    "cli/test_cli_resume.py::TestChanges::test_of_the_data_are_refused_unless_they_are_allowed": 1,
    "cli/test_cli_resume.py::TestChanges::test_of_the_recipe_are_refused_by_name": 1,
    "cli/test_cli_resume.py::TestChanges::test_of_versions_are_refused_unless_they_are_allowed": 0,
    "cli/test_cli_resume.py::TestChanges::test_of_where_the_data_lie_are_none": 0,
    "cli/test_cli_resume.py::TestChanges::test_several_are_told_together": 0,
    "cli/test_cli_resume.py::TestDamage::test_a_whole_one_is_taken_without_a_word": 0,
    "cli/test_cli_resume.py::TestDamage::test_falls_back_and_says_why": 1,
    "cli/test_cli_resume.py::TestDamage::test_nothing_is_trained_anew_unasked_where_all_are_damaged": 0,
    "cli/test_cli_resume.py::TestDamage::test_one_that_was_cut_off_is_none": 0,
    "cli/test_cli_resume.py::TestDamage::test_these_are_the_files": 0,
    "cli/test_cli_resume.py::TestFinished::test_it_needs_no_checkpoints_for_that": 0,
    "cli/test_cli_resume.py::TestFinished::test_what_comes_after_training_is_made_up_for": 0,
    "cli/test_cli_search.py::test_a_budget_instead_of_the_threshold": 0,
    "cli/test_cli_search.py::test_a_finished_search_is_kept_also_without_checkpoints": 0,
    "cli/test_cli_search.py::test_a_killed_run_goes_on_in_the_stage_it_was_in": 0,
    "cli/test_cli_search.py::test_patience_ends_the_search": 0,
    "cli/test_cli_seq2seq.py::test_a_killed_run_goes_on_as_if_it_had_not_been": 0,
    "cli/test_cli_seq2seq.py::test_closed_ranks_leave_memory": 0,
    "cli/test_cli_seq2seq.py::test_every_method_trains_and_exports": 1,
    "cli/test_cli_seq2seq.py::test_the_best_state_by_what_is_written": 0,
    "cli/test_cli_signals.py::test_a_search_is_stopped_and_goes_on_too": 0,
    "cli/test_cli_signals.py::test_after_training_it_names_what_was_saved_before": 0,
    "cli/test_cli_signals.py::test_in_the_last_step_it_is_saved_like_any_other": 0,
    "cli/test_cli_signals.py::test_only_a_second_ctrl_c_that_comes_later_ends_at_once": 0,
    "cli/test_cli_signals.py::test_the_step_is_finished_saved_and_the_run_can_go_on": 1,
    "cli/test_cli_train.py::test_budgets_in_every_unit": 1,
    "cli/test_cli_train.py::test_classifiers": 1,
    "cli/test_cli_train.py::test_dry_run_counts_the_steps_of_the_run": 0,
    "cli/test_cli_train.py::test_language_models": 1,
    "cli/test_cli_train.py::test_looking_more_often_changes_nothing": 1,
    "cli/test_cli_trained.py::test_bf16_on_a_cpu_trains": 1,
    "cli/test_cli_trained.py::test_the_command_that_the_message_names_exports_what_was_trained": 1,
    "cli/test_cli_words.py::test_a_killed_run_goes_on_as_if_nothing_had_happened": 1,
    "cli/test_cli_words.py::test_a_run_is_judged_alike_from_its_files": 1,
    "compare/test_statistics.py::TestVariance::test_the_truth_is_in_about_95_percent_of_the_intervals": 2,
    "methods/test_ablora.py::test_a_round_is_that_of_the_naive_twin": 3,
    "methods/test_adalora_parity.py::test_as_published_the_first_steps_stay_far_behind": 1,
    "methods/test_adalora_parity.py::test_first_steps_of_adam_go_as_far_as_loras": 0,
    "methods/test_adalora_parity.py::test_paper_order_is_the_twins_until_the_ranks_are_frozen": 1,
    "methods/test_adalora_parity.py::test_paper_order_without_a_penalty_keeps_to_the_twin_where_ranks_are_kept": 0,
    "methods/test_adalora_parity.py::test_parity_is_a_larger_scale_and_nothing_else": 0,
    "methods/test_adalora_parity.py::test_reference_order_is_the_twins_to_the_last_step": 1,
    "methods/test_adalora_parity.py::test_reference_order_leaves_the_moments_of_closed_triplets_alone": 0,
    "methods/test_adalora_parity.py::test_simpler_importances_are_the_twins": 0,
    "methods/test_adalora_parity.py::test_the_first_step_of_sgd_goes_as_far_as_loras": 2,
    "methods/test_autolora.py::TestPlan::test_a_planted_problem": 0,
    "methods/test_autolora_gradient.py::TestPasses::test_are_as_documented": 5,
    "methods/test_autolora_replay.py::test_what_loops_do_to_the_models_own_loss_is_taken": 8,
    "methods/test_contract.py::TestContract::test_a_bad_step_moves_nothing_is_counted_and_does_not_spread": 4,
    "methods/test_contract.py::TestContract::test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit": 6,
    "methods/test_contract.py::TestContract::test_a_run_that_goes_back_in_its_own_process_is_the_uninterrupted_one": 8,
    "methods/test_contract.py::TestContract::test_a_run_that_stops_early_meets_the_budget": 8,
    "methods/test_contract.py::TestContract::test_a_seed_is_a_run": 1,
    "methods/test_contract.py::TestContract::test_a_sound_step_does_move": 4,
    "methods/test_contract.py::TestContract::test_bad_steps_without_end_are_given_up": 4,
    "methods/test_contract.py::TestContract::test_dtypes_stay": 6,
    "methods/test_contract.py::TestContract::test_eight_accumulated_batches_are_one_batch": 1,
    "methods/test_contract.py::TestContract::test_frozen_weights_are_never_touched": 4,
    "methods/test_contract.py::TestContract::test_looking_changes_nothing": 1,
    "methods/test_contract.py::TestContract::test_the_budget_is_met_at_every_event_and_by_the_plan": 10,
    "methods/test_contract.py::TestContract::test_the_count_of_bad_steps_goes_on_after_a_checkpoint": 4,
    "methods/test_contract.py::TestContract::test_the_finished_model_is_plain_lora_that_computes_the_same": 3,
    "methods/test_contract.py::TestContract::test_the_plan_is_the_gates_and_the_factors": 5,
    "methods/test_step_parity.py::test_the_first_steps_go_as_far_as_loras_at_its_learning_rate": 4,
    "reference/test_adalora_twin_loop.py::test_averages_and_scores_rest_in_the_final_phase": 3,
    "report/test_figures.py::test_the_heat_map_of_a_huge_model_stays_a_picture_one_can_open": 0,
    "report/test_page.py::TestModels::test_hundreds_of_modules": 0,
    "strangers/test_patterns.py::test_one_that_explodes_is_refused_in_less_than_a_second": 10,
    "strangers/test_runs.py::test_metrics_that_are_none_are_left_out": 2,
    "tasks/test_as_trl.py::test_the_same_tokens_are_learned_with_the_same_losses": 3,
    "tasks/test_data.py::test_demo_data_by_split": 0,
    "tasks/test_docstrings.py::test_another_process_makes_the_same_rows": 0,
    "tasks/test_docstrings.py::test_areas_are_many_and_balanced": 0,
    "tasks/test_docstrings.py::test_splits_share_no_module_and_no_text": 0,
    "tasks/test_sequence_classification.py::test_a_trainer_takes_it": 2,
    "test_gating.py::test_the_whole_model_compiles_into_one_graph_and_closing_ranks_compiles_nothing_anew": 0,
    "test_kernel.py::TestSecondDerivatives::test_agree_with_differences": 4,
    "test_kernel_dtypes.py::TestCompile::test_full_graph_equals_eager": 2,
    "test_kernel_dtypes.py::TestCompile::test_one_graph_serves_every_batch_size": 0,
    "test_kernel_linear.py::test_a_compiled_layer_equals_the_eager_one": 1,
    "test_kernel_linear.py::test_derivatives_agree_with_differences": 8,
    "test_planted_ranks.py::test_every_method_learns_within_the_budget_and_the_same_twice": 6,
    "training/test_ablation.py::test_every_way_is_the_naive_one": 3,
    "training/test_ablation.py::test_the_ways_agree_with_each_other_in_fp64": 1,
    "training/test_ablation_stacks.py::test_every_way_is_the_naive_one": 8,
    "training/test_ablation_walk.py::test_hooks_of_others_run_once": 1,
    "training/test_autolora_trainer.py::test_a_step_computed_again_is_the_step": 2,
    "training/test_autolora_trainer.py::test_a_term_that_the_trainer_adds_is_refused_where_a_step_is_computed_again": 2,
    "training/test_autolora_trainer.py::test_what_a_trainer_does_to_the_models_own_loss_is_taken": 2,
    "training/test_bad_steps.py::test_a_run_that_does_not_wait_is_the_run_that_does": 4,
    "training/test_callback.py::test_the_number_of_steps_comes_from_the_trainer": 2,
    "training/test_callback_cures.py::test_each_trainer_gets_an_allocation_of_its_own": 0,
    "training/test_callback_promises.py::test_a_bad_step_is_skipped_counted_and_reported": 2,
    "training/test_callback_promises.py::test_a_loss_scaler_may_overflow_at_the_start_of_a_warm_up": 2,
    "training/test_callback_promises.py::test_the_cure_for_a_loss_that_ignores_accumulation_gives_the_same_plan": 0,
    "training/test_callback_promises.py::test_the_run_does_not_depend_on": 3,
    "training/test_callback_refusals.py::test_an_early_best_model_is_refused_with_the_cure": 3,
    "training/test_callback_refusals.py::test_evaluations_may_start_early_when_the_last_model_is_kept": 0,
    "training/test_callback_refusals.py::test_the_best_model_of_the_final_phase_comes_back": 1,
    "training/test_compaction.py::test_a_compacted_run_ends_with_the_weights_of_a_masked_one": 3,
    "training/test_compaction.py::test_a_run_resumed_on_either_side_is_the_uninterrupted_one_bit_for_bit": 2,
    "training/test_compaction.py::test_ranks_of_any_age_go_on_after_the_last_round": 0,
    "training/test_fresh_ranks.py::test_a_fresh_rank_moves_as_with_an_optimizer_of_its_own": 8,
    "training/test_gated_files.py::test_every_checkpoint_and_save_model_are_right_in_stock_peft": 2,
    "training/test_methods_in_trainers.py::test_it_trains_meets_its_budget_and_exports": 4,
    "training/test_own_loop.py::test_micro_batches_are_no_steps": 2,
    "training/test_quantized_methods.py::test_attaching_changes_no_output": 6,
    "training/test_quantized_methods.py::test_what_was_trained_computes_the_same_on_a_base_that_is_loaded_anew": 2,
    "training/test_resume_callback.py::test_a_damaged_marker_is_refused": 3,
    "training/test_resume_callback.py::test_a_resume_after_the_last_step_finishes_the_run": 1,
    "training/test_resume_callback.py::test_an_interrupted_trainer_resumes_from_before_its_final_phase": 1,
    "training/test_resume_callback.py::test_killed_and_resumed_equals_uninterrupted_bit_for_bit": 1,
    "training/test_resume_callback.py::test_other_settings_are_refused_by_name": 2,
    "training/test_sft.py::test_a_method_that_looks_at_validation_data": 0,
    "training/test_sft.py::test_ablation_scores_look_at_tokenized_validation_data": 0,
    "training/test_sft.py::test_accumulated_micro_batches_give_the_plan_of_the_whole_batch": 0,
    "training/test_sft.py::test_it_prunes_to_the_budget_and_leaves_plain_lora": 1,
    "training/test_trainer.py::TestResume::test_a_line_that_was_cut_off": 0,
    "training/test_trainer.py::TestResume::test_counts_the_time_before_it": 0,
    "training/test_trainer.py::TestResume::test_falls_back_when_killed_while_saving": 0,
    "training/test_trainer.py::TestResume::test_is_the_run_that_was_not_killed": 1,
    "training/test_trainer.py::TestResume::test_killed_after_the_last_step": 0,
}
"""By the test's name below tests/. Variants that are marked as slow themselves do not count."""

CHECKED: Mapping[str, int] = {
    "cli/test_cli_full_disk.py::test_in_a_checkpoint": 3,
    "cli/test_cli_papers.py::test_ten_steps_end_in_an_adapter_with_all_that_is_new": 14,
    "cli/test_cli_precisions.py::test_a_language_model_trains_exports_and_evaluates": 18,
    "cli/test_cli_quantized.py::TestMethods::test_a_run_ends_with_an_adapter": 6,
    "cli/test_cli_resume.py::TestDamage::test_a_flipped_bit_in_any_file": 10,
    "cli/test_cli_sharded.py::test_the_adapter_is_that_of_ddp": 3,
    "cli/test_cli_signals.py::test_a_scheduler_that_sends_it_from_outside_to_all_processes": 1,
    "methods/test_contract.py::TestContract::test_a_bad_step_moves_nothing_is_counted_and_does_not_spread": 36,
    "methods/test_contract.py::TestContract::test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit": 36,
    "methods/test_contract.py::TestContract::test_a_run_that_goes_back_in_its_own_process_is_the_uninterrupted_one": 30,
    "methods/test_contract.py::TestContract::test_a_run_that_stops_early_meets_the_budget": 60,
    "methods/test_contract.py::TestContract::test_the_budget_is_met_at_every_event_and_by_the_plan": 70,
    "test_kernel_device.py::test_value_and_gradients": 74,
    "training/test_export_matrix.py::test_a_run_ends_with_an_adapter": 60,
    "training/test_quantized_methods.py::test_and_in_other_precisions": 34,
    "training/test_resume_callback.py::test_killed_and_resumed_equals_uninterrupted_bit_for_bit": 6,
    "training/test_sharded.py::test_every_method_decides_as_one_process_with_the_whole_batch": 6,
    "training/test_trainer.py::TestResume::test_is_the_run_that_was_not_killed": 8,
}
"""Of the variants that are not fast, by the test's name below tests/."""


def mark_variants(items: Iterable[pytest.Item]) -> None:
    """Mark all but some variants of these tests as slow, and most of the slow ones of some tests as thorough.

    Args:
        items: What has been collected.
    """
    variants: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        variants[item.nodeid.partition("[")[0].removeprefix("tests/")].append(item)
    for name, found in variants.items():
        candidates = [item for item in found if not is_slow(item)] if name in FAST else []
        for item in left_out(candidates, FAST.get(name, 0)):
            item.add_marker(pytest.mark.slow)
        if name in CHECKED:
            for item in left_out([item for item in found if is_slow(item)], CHECKED[name]):
                item.add_marker(pytest.mark.thorough)


def is_slow(item: pytest.Item) -> bool:
    """Whether a test is marked as slow."""
    return item.get_closest_marker("slow") is not None


def left_out(items: Sequence[pytest.Item], chosen: int) -> list[pytest.Item]:
    """All but some that are spread over all of them."""
    places = spread(len(items), min(chosen, len(items)))
    return [item for index, item in enumerate(items) if index not in places]


def spread(count: int, chosen: int) -> set[int]:
    """Choose some of a number of places, all over them; where they are a product, not always the same of one factor.

    >>> sorted(spread(9, 3))
    [0, 4, 8]
    """
    step = max(1, round(count / max(1, chosen)))
    while gcd(step, count) > 1:
        step += 1
    return {index * step % count for index in range(chosen)}
