-- The message of each commit and the files that it changed, which stages 1 and 2 do not carry to
-- save memory. Commits whose list of files was cut off are left out.
SELECT
  dedup.commit,
  commits.subject,
  commits.message,
  dedup.repos,
  dedup.licenses,
  commits.difference
FROM commits_table_dedup AS dedup
JOIN `bigquery-public-data.github_repos.commits` AS commits ON commits.commit = dedup.commit
WHERE NOT COALESCE(commits.difference_truncated, FALSE)
-- A commit of several exports has one row in each.
QUALIFY ROW_NUMBER() OVER (PARTITION BY dedup.commit ORDER BY ARRAY_LENGTH(commits.difference) DESC) = 1
